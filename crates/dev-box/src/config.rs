//! The configuration: defaults, then files, then the environment; the command line comes last and is the caller's.
//!
//! Later layers win, key by key:
//! 1. built-in defaults ([`Config::default`]);
//! 2. `/etc/dev-box/config.toml`;
//! 3. `$XDG_CONFIG_HOME/dev-box/config.toml` (`~/.config` where the variable is not set);
//! 4. variables `DEV_BOX_<SECTION>__<KEY>`, such as `DEV_BOX_VM__MEMORY=4GiB`.
//!
//! An unknown key is an error that names the key and the file it stands in.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use dev_box_core::accel::AcceleratorPolicy;
use dev_box_core::size::ByteSize;
use dev_box_exec::pool::ResetPolicy;
use dev_box_image::ImageName;
use dev_box_observe::anomaly::{Plan, RuleConfig};
use figment::Figment;
use figment::providers::{Env, Format, Serialized, Toml};
use serde::{Deserialize, Serialize};

/// Where the administrator's settings lie.
const SYSTEM_FILE: &str = "/etc/dev-box/config.toml";

/// Everything that can be set. See the module for where it comes from.
///
/// ```
/// let config = dev_box::Config::default();
/// assert_eq!(config.host.uri, "qemu:///system");
/// ```
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The host: libvirt and where state lies.
    pub host: HostConfig,
    /// What a VM gets unless the request says otherwise.
    pub vm: VmConfig,
    /// Limits in time.
    pub timeouts: Timeouts,
    /// Limits of what a job may send back.
    pub limits: Limits,
    /// What is watched, and what is done about it.
    pub observe: ObserveConfig,
    /// The daemon, `dev-box serve`.
    pub daemon: DaemonConfig,
    /// VMs that the daemon keeps ready.
    pub pool: PoolConfig,
}

/// Section `[daemon]`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DaemonConfig {
    /// Its socket; `dev-box.sock` in `host.run_root` where this is not set.
    pub socket: Option<PathBuf>,
    /// The group whose members may use it, besides root and the daemon's own user. Whoever may use it may make VMs and
    /// run anything in any of the daemon's VMs; nobody else may where this is not set.
    pub group: Option<String>,
}

/// Section `[pool]`: VMs that `dev-box serve` keeps ready. They are as `[vm]` describes them, with the default network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PoolConfig {
    /// How many are kept ready.
    pub ready: usize,
    /// How many there are at most, those in use included; 0 is no pool.
    pub max: usize,
    /// How many are kept half-made besides, so that the next takes less time.
    pub shells: usize,
    /// `replace`, or `rewind` for jobs of one trust domain.
    pub reset: ResetPolicy,
    /// How long a run waits for a VM of the pool, in milliseconds, before it makes one itself.
    pub wait_ms: u64,
    /// One pool for each of these templates, each with these numbers; where there is none, one pool of any template that fits.
    pub templates: Vec<ImageName>,
}

impl Default for PoolConfig {
    fn default() -> Self {
        Self {
            ready: 0,
            max: 0,
            shells: 0,
            reset: ResetPolicy::default(),
            // In more time it has made one.
            wait_ms: 2000,
            templates: Vec::new(),
        }
    }
}

/// Section `[host]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HostConfig {
    /// The libvirt URI.
    pub uri: String,
    /// Images, VM directories and the audit log lie beneath it.
    pub state_root: PathBuf,
    /// Address leases lie here: one place for the whole host, whatever the state root, since its network is one.
    pub run_root: PathBuf,
    /// libvirt's name for the VMs' network; the VMs of another are in the other's hands.
    pub network: String,
    /// The name of its bridge.
    pub bridge: String,
    /// Whether that network has IPv6, for VMs whose policy says so. The host then forwards IPv6.
    pub ipv6: bool,
    /// Network policies by name, `NAME.toml` each.
    pub policies: PathBuf,
    /// Where the name servers are read that names of network policies are asked of.
    pub resolv_conf: PathBuf,
    /// Where the audit log's first key is put when the log begins; `audit-first.key` of the state root where this is
    /// not set. Only verification needs it: keep it where whoever takes this host cannot reach it.
    pub audit_key: Option<PathBuf>,
    /// The user QEMU runs as, whom a VM's share directory must belong to.
    pub qemu_user: String,
}

impl Default for HostConfig {
    fn default() -> Self {
        Self {
            uri: "qemu:///system".to_owned(),
            state_root: PathBuf::from("/var/lib/dev-box"),
            run_root: PathBuf::from("/run/dev-box"),
            network: "dev-box".to_owned(),
            bridge: "devbox0".to_owned(),
            ipv6: false,
            policies: PathBuf::from("/etc/dev-box/policies"),
            resolv_conf: PathBuf::from("/etc/resolv.conf"),
            audit_key: None,
            qemu_user: "libvirt-qemu".to_owned(),
        }
    }
}

/// Section `[vm]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VmConfig {
    /// The image, by name.
    pub image: String,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Guest memory.
    pub memory: ByteSize,
    /// Size of the VM's disk (sparse: what is not written takes no space).
    pub disk: ByteSize,
    /// `auto` (KVM where it works, else software emulation with a warning), `kvm` or `tcg`.
    pub accelerator: AcceleratorPolicy,
}

impl Default for VmConfig {
    fn default() -> Self {
        Self {
            image: "default".to_owned(),
            cpus: 2,
            memory: ByteSize::mib(2048),
            disk: ByteSize::gib(10),
            accelerator: AcceleratorPolicy::Auto,
        }
    }
}

/// Section `[timeouts]`, in seconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Timeouts {
    /// From the start of QEMU to the agent's answer.
    pub boot_s: u64,
    /// A job's, unless the request says otherwise.
    pub job_s: u64,
    /// Between TERM and KILL.
    pub grace_s: u64,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { boot_s: 60, job_s: 3600, grace_s: 5 }
    }
}

impl Timeouts {
    /// From the start of QEMU to the agent's answer.
    pub fn boot(&self) -> Duration {
        Duration::from_secs(self.boot_s)
    }
}

/// Section `[limits]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Output of a job, stdout and stderr each; more is cut and marked.
    pub output: ByteSize,
    /// A workspace, in and out.
    pub workspace: ByteSize,
    /// Files of a workspace, in and out.
    pub workspace_files: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { output: ByteSize::mib(1024), workspace: ByteSize::gib(8), workspace_files: 200_000 }
    }
}

/// Section `[observe]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ObserveConfig {
    /// Whether VMs are watched. What is done with them is audited in any case.
    pub enabled: bool,
    /// Between two looks at a VM, in ms.
    pub sample_ms: u64,
    /// Where the daemon serves `/metrics` for Prometheus, such as `127.0.0.1:9440`; nowhere where this is not set. Whoever
    /// reaches it reads them.
    pub metrics_listen: Option<SocketAddr>,
    /// Where alerts are posted.
    pub webhook_url: Option<String>,
    /// The file with the secret by which they are signed.
    pub webhook_secret: Option<PathBuf>,
    /// Thresholds of the rules.
    pub rules: RuleConfig,
    /// What is done about which finding.
    pub plan: Plan,
}

impl Default for ObserveConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            sample_ms: 2000,
            metrics_listen: None,
            webhook_url: None,
            webhook_secret: None,
            rules: RuleConfig::default(),
            plan: Plan::default(),
        }
    }
}

/// A setting that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// What figment found: it names the key and the file or variable.
    #[error("configuration: {0}")]
    Invalid(Box<figment::Error>),
    /// `--config` names a file that is not there.
    #[error("configuration file {} does not exist", .0.display())]
    Missing(PathBuf),
}

impl Config {
    /// Reads all layers; with `file`, that file in place of the two usual ones.
    ///
    /// # Errors
    /// A malformed or unknown setting, with its place; a `file` that is not there.
    pub fn load(file: Option<&Path>) -> Result<Self, ConfigError> {
        let mut figment = Figment::from(Serialized::defaults(Self::default()));
        match file {
            Some(path) if !path.is_file() => return Err(ConfigError::Missing(path.to_owned())),
            Some(path) => figment = figment.merge(Toml::file_exact(path)),
            None => {
                figment = figment.merge(Toml::file(SYSTEM_FILE));
                if let Some(dir) = user_config_dir() {
                    figment = figment.merge(Toml::file(dir.join("dev-box/config.toml")));
                }
            }
        }
        // Single variables of other meaning (DEV_BOX_LOG, ...) have no section, hence no `__`.
        let environment = Env::prefixed("DEV_BOX_").filter(|key| key.as_str().contains("__")).split("__");
        figment.merge(environment).extract().map_err(|error| ConfigError::Invalid(Box::new(error)))
    }

    /// Where the audit log lies.
    #[must_use]
    pub fn audit_dir(&self) -> PathBuf {
        self.host.state_root.join("audit")
    }

    /// Where the daemon listens.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.daemon.socket.clone().unwrap_or_else(|| self.host.run_root.join("dev-box.sock"))
    }

    /// Where the audit log's first key is put.
    #[must_use]
    pub fn audit_key(&self) -> PathBuf {
        self.host.audit_key.clone().unwrap_or_else(|| self.host.state_root.join("audit-first.key"))
    }
}

fn user_config_dir() -> Option<PathBuf> {
    match std::env::var_os("XDG_CONFIG_HOME").filter(|dir| !dir.is_empty()) {
        Some(dir) => Some(dir.into()),
        None => Some(PathBuf::from(std::env::var_os("HOME")?).join(".config")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.toml");
        std::fs::write(&file, text).unwrap();
        Config::load(Some(&file))
    }

    #[test]
    fn a_file_overrides_only_what_it_names() {
        let config = load("[vm]\nmemory = \"512MiB\"\n").unwrap();
        assert_eq!(config.vm.memory, ByteSize::mib(512));
        assert_eq!(config.vm.cpus, VmConfig::default().cpus);
    }

    #[test]
    fn a_network_has_ipv6_where_the_administrator_says_so() {
        let config = load("[host]\nipv6 = true\nnetwork = \"other\"\nbridge = \"other0\"\n").unwrap();
        let HostConfig { network, bridge, ipv6, .. } = config.host;
        assert_eq!((network.as_str(), bridge.as_str(), ipv6), ("other", "other0", true));
        assert!(!load("").unwrap().host.ipv6);
    }

    #[test]
    fn an_unknown_key_is_named_with_its_file() {
        let text = load("[vm]\nmemroy = \"512MiB\"\n").unwrap_err().to_string();
        assert!(text.contains("memroy") && text.contains("config.toml"), "{text}");
    }

    #[test]
    fn the_usual_files_need_not_be_there() {
        // The machine that runs this has either none or valid ones.
        Config::load(None).unwrap();
    }

    #[test]
    fn one_rule_is_set_and_the_others_stay() {
        let text = "[observe.rules]\nforks = 100\n[observe.plan.actions]\nfork_rate = [\"log\", \"kill\"]\n";
        let config = load(text).unwrap();
        assert_eq!(config.observe.rules, RuleConfig { forks: 100, ..RuleConfig::default() });
        let actions = &config.observe.plan.actions;
        assert_eq!(actions.len(), Plan::default().actions.len());
        assert_eq!(actions[&dev_box_observe::anomaly::Rule::ForkRate].len(), 2);
        assert!(load("[observe.plan.actions]\nfork_rat = [\"log\"]\n").is_err());
    }

    #[test]
    fn a_malformed_value_is_named() {
        let text = load("[vm]\nmemory = \"a lot\"\n").unwrap_err().to_string();
        assert!(text.contains("memory"), "{text}");
    }

    #[test]
    fn a_named_file_must_exist() {
        let error = Config::load(Some(Path::new("/nonexistent/config.toml"))).unwrap_err();
        assert!(matches!(error, ConfigError::Missing(_)));
    }
}
