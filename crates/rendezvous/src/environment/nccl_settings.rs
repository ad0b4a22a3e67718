//! NCCL's variables as settings of a program: checked against a table and this machine, and set before NCCL starts.
//!
//! NCCL reads its variables once, when the first communicator of a process is made. What the user has set
//! in the environment stays; settings fill in the rest.

use std::collections::BTreeMap;
use std::path::Path;

use Value::{Adapters, Between, FileToRead, FileToWrite, Interfaces, OneOf, SomeOf, Switch};

/// NCCL's variables that users tune, by their own names, as `NCCL_DEBUG` is `INFO`. What is left out is NCCL's own
/// default.
///
/// # Source
/// "Environment variables" in NCCL's user guide.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(transparent))]
pub struct NcclSettings {
    /// Values by variable.
    pub variables: BTreeMap<String, String>,
}

/// What a variable's value may be.
enum Value {
    /// 0 or 1.
    Switch,
    /// A word.
    OneOf(&'static [&'static str]),
    /// Words between commas; `^` before the first means "not these".
    SomeOf(&'static [&'static str]),
    Between(u32, u32),
    FileToRead,
    FileToWrite,
    /// Prefixes of names between commas; `=` before the first: exact names; `^`: not these.
    Interfaces,
    /// As interfaces.
    Adapters,
}

/// The variables that may be set, and to what. `NCCL_LAUNCH_ORDER_IMPLICIT` and the algorithm `PAT` are not known to
/// older libraries: [`nccl_lacks`](super::nccl_lacks).
const KNOWN: [(&str, Value); 18] = [
    (
        "NCCL_ALGO",
        SomeOf(&["Ring", "Tree", "CollnetDirect", "CollnetChain", "NVLS", "NVLSTree", "PAT"]),
    ),
    ("NCCL_BUFFSIZE", Between(1, i32::MAX.unsigned_abs())),
    ("NCCL_DEBUG", OneOf(&["VERSION", "WARN", "INFO", "TRACE"])),
    ("NCCL_DEBUG_FILE", FileToWrite),
    (
        "NCCL_DEBUG_SUBSYS",
        SomeOf(&[
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
        ]),
    ),
    ("NCCL_IB_DISABLE", Switch),
    ("NCCL_IB_GID_INDEX", Between(0, u32::MAX)),
    ("NCCL_IB_HCA", Adapters),
    ("NCCL_IB_TIMEOUT", Between(1, 31)),
    ("NCCL_LAUNCH_ORDER_IMPLICIT", Switch),
    (MAX_CHANNELS, Between(1, 64)),
    (MIN_CHANNELS, Between(1, 64)),
    ("NCCL_NET_GDR_LEVEL", OneOf(&["LOC", "PIX", "PXB", "PHB", "SYS"])),
    ("NCCL_NVLS_ENABLE", Switch),
    ("NCCL_P2P_LEVEL", OneOf(&["LOC", "NVL", "PIX", "PXB", "PHB", "SYS"])),
    ("NCCL_PROTO", SomeOf(&["LL", "LL128", "Simple"])),
    ("NCCL_SOCKET_IFNAME", Interfaces),
    ("NCCL_TOPO_FILE", FileToRead),
];
const MIN_CHANNELS: &str = "NCCL_MIN_NCHANNELS";
const MAX_CHANNELS: &str = "NCCL_MAX_NCHANNELS";

/// A setting that NCCL would not take, or that this machine has no use for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("nccl.{variable}: {what}")]
pub struct NcclSettingError {
    /// Which one.
    pub variable: String,
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

/// Or what is wrong.
type Check = std::result::Result<(), String>;

fn one_of(value: &str, known: &[&str]) -> Check {
    if known.iter().any(|name| name.eq_ignore_ascii_case(value)) {
        return Ok(());
    }
    Err(format!("{value:?} is not one of {}", known.join(", ")))
}

fn between(value: &str, least: u32, most: u32) -> Check {
    match value.parse::<u32>() {
        Ok(number) if (least..=most).contains(&number) => Ok(()),
        _ => Err(format!("{value} is not between {least} and {most}")),
    }
}

/// Names or prefixes, of which one at least must be there. `^` (not these) is always fine.
fn exists(what: &str, asked: &str, there: &[String]) -> Check {
    if asked.starts_with('^') {
        return Ok(());
    }
    let (exact, list) = match asked.strip_prefix('=') {
        Some(list) => (true, list),
        None => (false, asked),
    };
    if list.split(',').any(|wanted| wanted.trim().is_empty()) {
        return Err(format!("{asked:?} names no {what} between two commas, or none at all"));
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
    Err(format!("this machine has no {what} {list:?}; it has: {there}"))
}

impl Value {
    /// What NCCL takes, on whatever machine.
    fn check(&self, value: &str) -> Check {
        match self {
            Switch => one_of(value, &["0", "1"]),
            OneOf(known) => one_of(value, known),
            SomeOf(known) => {
                let list = value.strip_prefix('^').unwrap_or(value);
                list.split(',').try_for_each(|name| one_of(name, known))
            }
            Between(least, most) => between(value, *least, *most),
            FileToRead | FileToWrite | Interfaces | Adapters => Ok(()),
        }
    }

    fn check_on(&self, value: &str, machine: &Machine) -> Check {
        let path = Path::new(value);
        match self {
            Interfaces => exists("interface", value, &machine.interfaces),
            Adapters => exists("InfiniBand adapter", value, &machine.adapters),
            FileToRead => {
                std::fs::File::open(path).map(drop).map_err(|error| format!("{value}: {error}"))
            }
            FileToWrite => match path.parent() {
                Some(folder) if !folder.as_os_str().is_empty() && !folder.is_dir() => {
                    Err(format!("there is no folder {}", folder.display()))
                }
                _ => Ok(()),
            },
            _ => Ok(()),
        }
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
        self.each(Value::check)?;
        let number = |name| self.variables.get(name).and_then(|text| text.parse::<u32>().ok());
        match (number(MIN_CHANNELS), number(MAX_CHANNELS)) {
            (Some(least), Some(most)) if least > most => Err(NcclSettingError {
                variable: MIN_CHANNELS.to_owned(),
                what: format!("{least} is more than {MAX_CHANNELS}, {most}"),
            }),
            _ => Ok(()),
        }
    }

    fn check_on(&self, machine: &Machine) -> std::result::Result<(), NcclSettingError> {
        self.each(|kind, value| kind.check_on(value, machine))
    }

    fn each(
        &self,
        check: impl Fn(&Value, &str) -> Check,
    ) -> std::result::Result<(), NcclSettingError> {
        self.variables.iter().try_for_each(|(name, value)| {
            let checked = match KNOWN.iter().find(|(known, _)| known == name) {
                Some((_, kind)) => check(kind, value),
                None => one_of(name, &KNOWN.map(|(known, _)| known))
                    .map_err(|what| format!("{what}; others can be set in the environment")),
            };
            checked.map_err(|what| NcclSettingError { variable: name.clone(), what })
        })
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
    pub fn apply(&self) -> std::result::Result<Vec<(String, String, bool)>, NcclSettingError> {
        self.check()?;
        let mut seen = Vec::new();
        for (name, value) in self.variables.clone() {
            match super::process_variable(&name).filter(|given| !given.is_empty()) {
                Some(given) => seen.push((name, given, true)),
                None => {
                    std::env::set_var(&name, &value);
                    seen.push((name, value, false));
                }
            }
        }
        Ok(seen)
    }

    /// What a program prints at its start of what [`NcclSettings::apply`] returned: a line for each variable, with
    /// its value and who has set it, on rank 0; nothing on the others.
    pub fn lines(
        seen: &[(String, String, bool)],
        rank: usize,
    ) -> impl Iterator<Item = String> + '_ {
        let shown = if rank == 0 { seen } else { &[] };
        shown.iter().map(|(name, value, was_set)| {
            let origin = if *was_set { "set in the environment" } else { "from the configuration" };
            format!("nccl   {name}={value} ({origin})")
        })
    }
}

impl<N: Into<String>, V: Into<String>> FromIterator<(N, V)> for NcclSettings {
    fn from_iter<I: IntoIterator<Item = (N, V)>>(variables: I) -> Self {
        let owned = variables.into_iter().map(|(name, value)| (name.into(), value.into()));
        Self { variables: owned.collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> Machine {
        let names = |names: [&str; 2]| names.map(str::to_owned).to_vec();
        Machine { interfaces: names(["eth0", "lo"]), adapters: names(["mlx5_0", "mlx5_1"]) }
    }

    fn check(settings: &[(&str, &str)], machine: &Machine) -> String {
        let settings: NcclSettings = settings.iter().copied().collect();
        let checked = settings.check_values().and_then(|()| settings.check_on(machine));
        checked.err().map(|error| error.to_string()).unwrap_or_default()
    }

    #[test]
    fn good_settings_are_passed_through() {
        let settings = [
            ("NCCL_DEBUG", "INFO"),
            ("NCCL_DEBUG_SUBSYS", "^INIT,NET"),
            ("NCCL_SOCKET_IFNAME", "eth"),
            ("NCCL_IB_HCA", "=mlx5_1:1"),
            ("NCCL_ALGO", "^Tree,PAT"),
            ("NCCL_MAX_NCHANNELS", "8"),
            ("NCCL_P2P_LEVEL", "PXB"),
            ("NCCL_NET_GDR_LEVEL", "PHB"),
            ("NCCL_NVLS_ENABLE", "0"),
            ("NCCL_LAUNCH_ORDER_IMPLICIT", "1"),
        ];
        assert_eq!(check(&settings, &machine()), "");
        assert_eq!(check(&[], &Machine::default()), "");
        // Without `=` a name is a prefix; an excluded name need not exist.
        assert_eq!(check(&[("NCCL_IB_HCA", "mlx5")], &machine()), "");
        assert_eq!(check(&[("NCCL_SOCKET_IFNAME", "^docker")], &Machine::default()), "");
    }

    #[test]
    fn bad_settings_say_what_would_be_right() {
        let bad = [
            (
                "NCCL_SOCKET_IFNAME",
                "ib0",
                "nccl.NCCL_SOCKET_IFNAME: this machine has no interface \"ib0\"; it has: eth0, lo",
            ),
            ("NCCL_SOCKET_IFNAME", "=", "\"=\" names no interface"),
            ("NCCL_IB_HCA", "=mlx5", "it has: mlx5_0, mlx5_1"),
            ("NCCL_ALGO", "Rings", "\"Rings\" is not one of Ring, Tree"),
            ("NCCL_DEBUG_SUBSYS", "^INIT,^NET", "\"^NET\" is not one of INIT, COLL"),
            ("NCCL_DEBUG", "LOUD", "\"LOUD\" is not one of VERSION, WARN, INFO, TRACE"),
            ("NCCL_NET_GDR_LEVEL", "NVL", "\"NVL\" is not one of LOC, PIX"),
            ("NCCL_IB_TIMEOUT", "32", "32 is not between 1 and 31"),
            ("NCCL_IB_DISABLE", "yes", "\"yes\" is not one of 0, 1"),
            ("NCCL_BUFFSIZE", "0", "0 is not between 1 and "),
            ("NCCL_TOPO_FILE", "/nonexistent/topo.xml", "/nonexistent/topo.xml: No such file"),
            ("NCCL_DEBUG_FILE", "/nonexistent/nccl.%h", "there is no folder /nonexistent"),
            ("NCCL_DEBGU", "INFO", "\"NCCL_DEBGU\" is not one of NCCL_ALGO, NCCL_BUFFSIZE"),
        ];
        for (name, value, expected) in bad {
            let text = check(&[(name, value)], &machine());
            assert!(
                text.starts_with(&format!("nccl.{name}: ")) && text.contains(expected),
                "{text}"
            );
        }
        let crossed = check(&[(MIN_CHANNELS, "9"), (MAX_CHANNELS, "8")], &machine());
        assert!(crossed.contains("9 is more than NCCL_MAX_NCHANNELS, 8"), "{crossed}");
    }
}
