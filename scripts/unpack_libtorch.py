"""Unpacks what a libtorch tree needs (lib/ and include/) out of Python wheels; or, as "python", the packages themselves.

usage: unpack_libtorch.py cpu|cuda|python PIN_FILE WHEEL_FOLDER NEW_FOLDER

Only the standard library is used. The wheels to take are those the pin file names.
"""

import pathlib
import re
import shutil
import sys
import zipfile

# libtorch_cpu.so and all that it loads; its run-time path ends in $ORIGIN, so one folder will do.
CPU_LIBRARIES = {
    "libc10.so",
    "libgomp.so.1",
    "libtorch_cpu.so",
    "libcudart.so.13",
    "libcupti.so.13",
}
# For Python alone.
NOT_WANTED = {"libtorch_python.so", "libshm.so"}

# Of no use to torchrun and the stores.
NOT_FOR_PYTHON = (
    "torch/include/",
    "torch/share/",
    "torch/lib/libtorch_cuda_linalg.so",
    "nvidia/cu13/include/",
)


def destination(kind, member):
    """Where a member of a wheel goes in the tree; None for what is left out."""
    name = member.rsplit("/", 1)[-1]
    if kind == "python":
        return None if member.startswith(NOT_FOR_PYTHON) else f"site/{member}"
    if member.startswith("torch/include/"):
        return member.removeprefix("torch/")
    if not re.fullmatch(r"lib[^/]*\.so(\.\d+)*", name):
        return None
    if not re.match(r"(torch/lib|nvidia/[^/]+/lib)/[^/]+$", member):
        return None
    if name in NOT_WANTED or (kind == "cpu" and name not in CPU_LIBRARIES):
        return None
    return f"lib/{name}"


def wheels(pin_file, folder):
    """The wheel of each "name==version" line."""
    for name, version in re.findall(r"^([\w-]+)==([\w.]+)", pin_file.read_text(), re.MULTILINE):
        found = sorted(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl"))
        if len(found) != 1:
            sys.exit(f"setup: error: {folder} holds {len(found)} wheels of {name} {version}, expected 1")
        yield found[0]


def main():
    kind, pin_file, folder, new = sys.argv[1], *map(pathlib.Path, sys.argv[2:])
    for wheel in wheels(pin_file, folder):
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                target = None if member.endswith("/") else destination(kind, member)
                if target is None:
                    continue
                path = new / target
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, open(path, "wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
    if kind == "cpu":
        missing = CPU_LIBRARIES - {path.name for path in (new / "lib").iterdir()}
        if missing:
            sys.exit(f"setup: error: the wheels lack {', '.join(sorted(missing))}")


main()
