//! NCCL's variables as typed settings: checked against this machine, and set before NCCL starts.
//!
//! NCCL reads its variables once, when the first communicator of a process is made. What the user has set
//! in the environment stays; settings fill in the rest.

use std::path::{Path, PathBuf};

use super::nccl_levels::{NcclDebug, NcclGdrLevel, NcclP2pLevel};

/// NCCL's variables that users tune. What is left out is NCCL's own default.
///
/// # Source
/// "Environment variables" in NCCL's user guide.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
#[non_exhaustive]
pub struct NcclSettings {
    /// `NCCL_DEBUG`.
    pub debug: Option<NcclDebug>,
    /// `NCCL_DEBUG_SUBSYS`: INIT, COLL, P2P, SHM, NET, GRAPH, TUNING, ENV, ALLOC, PROXY, NVLS, … or ALL; `^` before
    /// the first: not these.
    pub debug_subsystems: Option<Vec<String>>,
    /// `NCCL_DEBUG_FILE`; `%h` becomes the host and `%p` the process.
    pub debug_file: Option<PathBuf>,
    /// `NCCL_SOCKET_IFNAME`: prefixes of interfaces; `=` before the first: exact names; `^`: not these.
    pub socket_interface: Option<String>,
    /// `NCCL_IB_HCA`: adapters as `mlx5_0` or `mlx5_0:1`; `=` and `^` as for interfaces.
    pub ib_adapters: Option<String>,
    /// `NCCL_IB_DISABLE`.
    pub ib_disable: Option<bool>,
    /// `NCCL_IB_TIMEOUT`: 4.096 µs × 2^n for each try, 1 to 31.
    pub ib_timeout: Option<u32>,
    /// `NCCL_IB_GID_INDEX`: which address of a `RoCE` port.
    pub ib_gid_index: Option<u32>,
    /// `NCCL_TOPO_FILE`: an XML file that describes the machine.
    pub topology_file: Option<PathBuf>,
    /// `NCCL_ALGO`: Ring, Tree, `CollnetDirect`, `CollnetChain`, NVLS, `NVLSTree`, PAT (from NCCL 2.23 on); `^` before
    /// the first: not these.
    pub algorithm: Option<Vec<String>>,
    /// `NCCL_PROTO`: LL, LL128, Simple; `^` as for algorithms.
    pub protocol: Option<Vec<String>>,
    /// `NCCL_MIN_NCHANNELS`, 1 to 64.
    pub min_channels: Option<u32>,
    /// `NCCL_MAX_NCHANNELS`, 1 to 64.
    pub max_channels: Option<u32>,
    /// `NCCL_BUFFSIZE`: bytes of a channel's buffer.
    pub buffer_bytes: Option<u64>,
    /// `NCCL_P2P_LEVEL`.
    pub p2p_level: Option<NcclP2pLevel>,
    /// `NCCL_NET_GDR_LEVEL`.
    pub gdr_level: Option<NcclGdrLevel>,
    /// `NCCL_NVLS_ENABLE`: `NVLink` SHARP.
    pub nvls: Option<bool>,
    /// `NCCL_LAUNCH_ORDER_IMPLICIT`: the calls of all communicators run on a GPU in the order in which this process makes
    /// them. From NCCL 2.26 on; a group over an older one is refused. Only for programs that wait for the calls of one
    /// group before they make those of another: calls of groups side by side reach NCCL in the order in which the
    /// groups' ranks meet, which may differ between ranks.
    pub launch_order_implicit: Option<bool>,
}

/// A setting that NCCL would not take, or that this machine has no use for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("nccl.{field}: {what}")]
pub struct NcclSettingError {
    /// Which one.
    pub field: &'static str,
    /// What is wrong, and what would be right.
    pub what: String,
}

/// What a machine has.
#[derive(Clone, Debug, Default)]
struct Machine {
    interfaces: Vec<String>,
    adapters: Vec<String>,
}

impl Machine {
    fn here() -> Self {
        Self { interfaces: names("/sys/class/net"), adapters: names("/sys/class/infiniband") }
    }
}

fn names(folder: &str) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> =
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort_unstable();
    names
}

type Check = std::result::Result<(), NcclSettingError>;

fn wrong(field: &'static str, what: String) -> Check {
    Err(NcclSettingError { field, what })
}

fn one_of(field: &'static str, value: &str, known: &[&str]) -> Check {
    if known.iter().any(|name| name.eq_ignore_ascii_case(value)) {
        return Ok(());
    }
    wrong(field, format!("{value:?} is not one of {}", known.join(", ")))
}

fn between(field: &'static str, value: Option<u32>, range: std::ops::RangeInclusive<u32>) -> Check {
    match value.filter(|value| !range.contains(value)) {
        None => Ok(()),
        Some(value) => {
            wrong(field, format!("{value} is not between {} and {}", range.start(), range.end()))
        }
    }
}

/// A list in which `^` before the first name means "not these".
fn names_of(field: &'static str, list: Option<&[String]>, known: &[&str]) -> Check {
    for (index, name) in list.unwrap_or_default().iter().enumerate() {
        let name = if index == 0 { name.strip_prefix('^').unwrap_or(name) } else { name };
        one_of(field, name, known)?;
    }
    Ok(())
}

/// Names or prefixes, of which one at least must be there. `^` (not these) is always fine.
fn exists(field: &'static str, what: &str, asked: Option<&str>, there: &[String]) -> Check {
    let Some(asked) = asked.filter(|asked| !asked.starts_with('^')) else { return Ok(()) };
    let (exact, list) = match asked.strip_prefix('=') {
        Some(list) => (true, list),
        None => (false, asked),
    };
    if list.split(',').any(|wanted| wanted.trim().is_empty()) {
        return wrong(
            field,
            format!("{asked:?} names no {what} between two commas, or none at all"),
        );
    }
    let matches = |name: &str, wanted: &str| {
        let wanted = wanted.split(':').next().unwrap_or(wanted);
        if exact {
            name == wanted
        } else {
            name.starts_with(wanted)
        }
    };
    if list.split(',').any(|wanted| there.iter().any(|name| matches(name, wanted.trim()))) {
        return Ok(());
    }
    let there = if there.is_empty() { "none".to_owned() } else { there.join(", ") };
    wrong(field, format!("this machine has no {what} {list:?}; it has: {there}"))
}

fn file(field: &'static str, path: Option<&Path>) -> Check {
    match path.map(|path| (path, std::fs::File::open(path))) {
        Some((path, Err(error))) => wrong(field, format!("{}: {error}", path.display())),
        _ => Ok(()),
    }
}

impl NcclSettings {
    /// Checks the settings against what NCCL takes, and against what this machine has: interfaces, adapters, files.
    ///
    /// # Errors
    ///
    /// The first setting that is wrong, and what would be right.
    pub fn check(&self) -> std::result::Result<(), NcclSettingError> {
        self.check_values()?;
        self.check_on(&Machine::here())
    }

    /// Checks the settings against what NCCL takes, on whatever machine.
    ///
    /// # Errors
    ///
    /// The first setting that is wrong, and what would be right.
    pub fn check_values(&self) -> std::result::Result<(), NcclSettingError> {
        const ALGORITHMS: [&str; 7] =
            ["Ring", "Tree", "CollnetDirect", "CollnetChain", "NVLS", "NVLSTree", "PAT"];
        const SUBSYSTEMS: [&str; 17] = [
            "INIT",
            "COLL",
            "P2P",
            "SHM",
            "NET",
            "GRAPH",
            "TUNING",
            "ENV",
            "ALLOC",
            "CALL",
            "PROXY",
            "NVLS",
            "BOOTSTRAP",
            "REG",
            "PROFILE",
            "RAS",
            "ALL",
        ];
        names_of("debug_subsystems", self.debug_subsystems.as_deref(), &SUBSYSTEMS)?;
        names_of("algorithm", self.algorithm.as_deref(), &ALGORITHMS)?;
        names_of("protocol", self.protocol.as_deref(), &["LL", "LL128", "Simple"])?;
        between("ib_timeout", self.ib_timeout, 1..=31)?;
        between("min_channels", self.min_channels, 1..=64)?;
        between("max_channels", self.max_channels, 1..=64)?;
        if let (Some(least), Some(most)) = (self.min_channels, self.max_channels) {
            if least > most {
                return wrong("min_channels", format!("{least} is more than max_channels, {most}"));
            }
        }
        match self.buffer_bytes {
            Some(0) => wrong("buffer_bytes", "0 is no size; NCCL's own is 4194304".to_owned()),
            _ => Ok(()),
        }
    }

    fn check_on(&self, machine: &Machine) -> Check {
        exists(
            "socket_interface",
            "interface",
            self.socket_interface.as_deref(),
            &machine.interfaces,
        )?;
        exists(
            "ib_adapters",
            "InfiniBand adapter",
            self.ib_adapters.as_deref(),
            &machine.adapters,
        )?;
        file("topology_file", self.topology_file.as_deref())?;
        let folder = self.debug_file.as_deref().and_then(Path::parent);
        match folder.filter(|folder| !folder.as_os_str().is_empty() && !folder.is_dir()) {
            Some(folder) => wrong("debug_file", format!("there is no folder {}", folder.display())),
            None => Ok(()),
        }
    }

    /// The variables that the settings stand for, in a fixed order.
    #[must_use]
    pub fn variables(&self) -> Vec<(&'static str, String)> {
        let switch = |value: Option<bool>| value.map(|on| u8::from(on).to_string());
        let word = |name: Option<&str>| name.map(str::to_owned);
        let number = |value: Option<u32>| value.map(|value| value.to_string());
        let list = |value: &Option<Vec<String>>| value.as_ref().map(|names| names.join(","));
        let path = |value: &Option<PathBuf>| value.as_ref().map(|path| path.display().to_string());
        let all = [
            ("NCCL_DEBUG", word(self.debug.map(NcclDebug::name))),
            ("NCCL_DEBUG_SUBSYS", list(&self.debug_subsystems)),
            ("NCCL_DEBUG_FILE", path(&self.debug_file)),
            ("NCCL_SOCKET_IFNAME", self.socket_interface.clone()),
            ("NCCL_IB_HCA", self.ib_adapters.clone()),
            ("NCCL_IB_DISABLE", switch(self.ib_disable)),
            ("NCCL_IB_TIMEOUT", number(self.ib_timeout)),
            ("NCCL_IB_GID_INDEX", number(self.ib_gid_index)),
            ("NCCL_TOPO_FILE", path(&self.topology_file)),
            ("NCCL_ALGO", list(&self.algorithm)),
            ("NCCL_PROTO", list(&self.protocol)),
            ("NCCL_MIN_NCHANNELS", number(self.min_channels)),
            ("NCCL_MAX_NCHANNELS", number(self.max_channels)),
            ("NCCL_BUFFSIZE", self.buffer_bytes.map(|bytes| bytes.to_string())),
            ("NCCL_P2P_LEVEL", word(self.p2p_level.map(NcclP2pLevel::name))),
            ("NCCL_NET_GDR_LEVEL", word(self.gdr_level.map(NcclGdrLevel::name))),
            ("NCCL_NVLS_ENABLE", switch(self.nvls)),
            ("NCCL_LAUNCH_ORDER_IMPLICIT", switch(self.launch_order_implicit)),
        ];
        all.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
    }

    /// Sets the variables in this process, but for those that the environment has already, and returns
    /// what NCCL will see: name, value, and whether the environment had it.
    ///
    /// Call it at the start of the program, while it has one thread: the C library's environment has no
    /// lock.
    ///
    /// # Errors
    ///
    /// As [`NcclSettings::check`]; nothing is set then.
    pub fn apply(
        &self,
    ) -> std::result::Result<Vec<(&'static str, String, bool)>, NcclSettingError> {
        self.check()?;
        let mut seen = Vec::new();
        for (name, value) in self.variables() {
            match super::process_variable(name).filter(|given| !given.is_empty()) {
                Some(given) => seen.push((name, given, true)),
                None => {
                    std::env::set_var(name, &value);
                    seen.push((name, value, false));
                }
            }
        }
        Ok(seen)
    }

    /// What a program prints at its start of what [`NcclSettings::apply`] returned: a line for each variable, with
    /// its value and who has set it, on rank 0; nothing on the others.
    pub fn lines<'a>(
        seen: &'a [(&'static str, String, bool)],
        rank: usize,
    ) -> impl Iterator<Item = String> + 'a {
        let shown = if rank == 0 { seen } else { &[] };
        shown.iter().map(|(name, value, was_set)| {
            let origin = if *was_set { "set in the environment" } else { "from the configuration" };
            format!("nccl   {name}={value} ({origin})")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> Machine {
        let names = |names: [&str; 2]| names.map(str::to_owned).to_vec();
        Machine { interfaces: names(["eth0", "lo"]), adapters: names(["mlx5_0", "mlx5_1"]) }
    }

    fn error(settings: &NcclSettings) -> String {
        settings
            .check_values()
            .and_then(|()| settings.check_on(&machine()))
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn what_is_left_out_sets_nothing() {
        assert!(NcclSettings::default().variables().is_empty());
        assert_eq!(NcclSettings::default().check_on(&Machine::default()), Ok(()));
    }

    #[test]
    fn good_settings_become_variables() {
        let settings = NcclSettings {
            debug: Some(NcclDebug::Info),
            p2p_level: Some(NcclP2pLevel::Pxb),
            gdr_level: Some(NcclGdrLevel::Phb),
            algorithm: Some(vec!["^Tree".to_owned(), "PAT".to_owned()]),
            socket_interface: Some("eth".to_owned()),
            ib_adapters: Some("=mlx5_1:1".to_owned()),
            nvls: Some(false),
            launch_order_implicit: Some(true),
            max_channels: Some(8),
            ..NcclSettings::default()
        };
        assert_eq!(settings.check_values(), Ok(()));
        assert_eq!(settings.check_on(&machine()), Ok(()));
        let expected = [
            ("NCCL_DEBUG", "INFO"),
            ("NCCL_SOCKET_IFNAME", "eth"),
            ("NCCL_IB_HCA", "=mlx5_1:1"),
            ("NCCL_ALGO", "^Tree,PAT"),
            ("NCCL_MAX_NCHANNELS", "8"),
            ("NCCL_P2P_LEVEL", "PXB"),
            ("NCCL_NET_GDR_LEVEL", "PHB"),
            ("NCCL_NVLS_ENABLE", "0"),
            ("NCCL_LAUNCH_ORDER_IMPLICIT", "1"),
        ];
        let variables = settings.variables();
        let actual: Vec<_> =
            variables.iter().map(|(name, value)| (*name, value.as_str())).collect();
        assert_eq!(actual, expected);
    }

    #[test]
    #[expect(clippy::shadow_unrelated, reason = "one message after the other")]
    fn bad_settings_say_what_would_be_right() {
        let with = |change: fn(&mut NcclSettings)| {
            let mut settings = NcclSettings::default();
            change(&mut settings);
            error(&settings)
        };
        let text = with(|s| s.socket_interface = Some("ib0".to_owned()));
        assert_eq!(
            text,
            "nccl.socket_interface: this machine has no interface \"ib0\"; it has: eth0, lo"
        );
        // Without `=` a name is a prefix; with it it is not.
        assert_eq!(
            NcclSettings { ib_adapters: Some("mlx5".to_owned()), ..NcclSettings::default() }
                .check_on(&machine()),
            Ok(())
        );
        let text = with(|s| s.ib_adapters = Some("=mlx5".to_owned()));
        assert!(text.contains("it has: mlx5_0, mlx5_1"), "{text}");
        let text = with(|s| s.algorithm = Some(vec!["Rings".to_owned()]));
        assert!(text.contains("\"Rings\" is not one of Ring, Tree"), "{text}");
        let text = with(|s| s.ib_timeout = Some(32));
        assert!(text.contains("32 is not between 1 and 31"), "{text}");
        let text = with(|s| (s.min_channels, s.max_channels) = (Some(9), Some(8)));
        assert!(text.contains("9 is more than max_channels, 8"), "{text}");
        let text = with(|s| s.topology_file = Some("/nonexistent/topo.xml".into()));
        assert!(text.contains("/nonexistent/topo.xml: No such file"), "{text}");
        let text = with(|s| s.debug_file = Some("/nonexistent/nccl.%h".into()));
        assert!(text.contains("there is no folder /nonexistent"), "{text}");
        let text = with(|s| s.buffer_bytes = Some(0));
        assert!(text.starts_with("nccl.buffer_bytes: 0 is no size"), "{text}");
        let text = with(|s| s.socket_interface = Some("=".to_owned()));
        assert!(text.starts_with("nccl.socket_interface: \"=\" names no interface"), "{text}");
        let text = with(|s| s.debug_subsystems = Some(vec!["^INIT".to_owned(), "^NET".to_owned()]));
        assert!(text.contains("\"^NET\" is not one of INIT, COLL"), "{text}");
    }

    #[test]
    fn an_excluded_name_need_not_exist() {
        let settings = NcclSettings {
            socket_interface: Some("^docker".to_owned()),
            ..NcclSettings::default()
        };
        assert_eq!(settings.check_on(&Machine::default()), Ok(()));
    }
}
