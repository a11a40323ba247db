//! Profiles: what a known agent needs, in one word. A profile fills in what the command line leaves open, and nothing else.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use dev_box::core::size::ByteSize;
use dev_box::net::EgressPolicy;
use serde::Deserialize;

use crate::args::RunArgs;

/// Those that come with dev-box.
const BUILT_IN: [(&str, &str); 3] = [
    ("claude", include_str!("profile/claude.toml")),
    ("codex", include_str!("profile/codex.toml")),
    ("copilot", include_str!("profile/copilot.toml")),
];

/// Why a profile cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProfileError {
    #[error(
        "there is no profile {0}: claude, codex and copilot come with dev-box; another is a file (./{0}, {0}.toml)"
    )]
    Unknown(String),
    #[error("cannot read the profile {}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("profile {name}")]
    Malformed { name: String, source: Box<toml::de::Error> },
    #[error("profile {profile} wants one of these variables, and none is set here: {}", names.join(", "))]
    NoCredential { profile: String, names: Vec<String> },
}

/// A profile as it is written.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Profile {
    /// For a person: what it is for.
    #[serde(default)]
    about: String,
    /// The image it runs on; the configuration's where not given.
    image: Option<String>,
    /// The template it is cloned from; any that serves where not given.
    template: Option<dev_box::image::ImageName>,
    /// Guest memory.
    memory: Option<ByteSize>,
    /// Virtual CPUs.
    cpus: Option<u32>,
    /// The longest it may run.
    #[serde(default, with = "humantime_option")]
    timeout: Option<Duration>,
    /// What may leave; `nat-filtered` where not given.
    network: Option<EgressPolicy>,
    /// Variables.
    #[serde(default)]
    env: BTreeMap<String, String>,
    /// Variables passed on by name, where they are set here.
    #[serde(default)]
    env_from_host: Vec<String>,
    /// At least one of them must be set; each that is, is passed on.
    #[serde(default)]
    credentials: Vec<String>,
    /// Processes and threads.
    limit_pids: Option<u64>,
    /// Memory of all processes together.
    limit_memory: Option<ByteSize>,
}

/// Times as a person writes them: `90s`, `2h`.
mod humantime_option {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer};

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
        let Some(text) = Option::<String>::deserialize(from)? else { return Ok(None) };
        crate::args::duration(&text).map(Some).map_err(serde::de::Error::custom)
    }
}

impl Profile {
    /// The profile of this name, or in this file.
    pub(crate) fn find(name: &str) -> Result<Self, ProfileError> {
        if let Some((_, text)) = BUILT_IN.iter().find(|(built_in, _)| *built_in == name) {
            return Self::parse(name, text);
        }
        let path = Path::new(name);
        if !path.exists() && !name.contains('/') && path.extension().is_none() {
            return Err(ProfileError::Unknown(name.to_owned()));
        }
        let text = std::fs::read_to_string(path)
            .map_err(|source| ProfileError::Read { path: path.to_owned(), source })?;
        Self::parse(name, &text)
    }

    fn parse(name: &str, text: &str) -> Result<Self, ProfileError> {
        toml::from_str(text)
            .map_err(|source| ProfileError::Malformed { name: name.to_owned(), source: Box::new(source) })
    }

    /// Fills in what the command line leaves open. `is_set` says which variables there are here.
    pub(crate) fn apply(
        self,
        name: &str,
        args: &mut RunArgs,
        is_set: impl Fn(&str) -> bool,
    ) -> Result<(), ProfileError> {
        let given = |variable: &String| {
            args.job.env.iter().any(|(name, _)| name == variable) || args.job.env_from_host.contains(variable)
        };
        if !self.credentials.is_empty() && !self.credentials.iter().any(|name| is_set(name) || given(name)) {
            return Err(ProfileError::NoCredential { profile: name.to_owned(), names: self.credentials });
        }
        let passed: Vec<String> = self
            .credentials
            .into_iter()
            .chain(self.env_from_host)
            .filter(|name| is_set(name) && !given(name))
            .collect();
        let fixed: Vec<(String, String)> = self.env.into_iter().filter(|(name, _)| !given(name)).collect();
        args.job.env_from_host.extend(passed);
        // First, so that the command line's come later and win.
        args.job.env.splice(0..0, fixed);
        let vm = &mut args.vm;
        vm.image = vm.image.take().or(self.image);
        if !vm.no_template {
            vm.template = vm.template.take().or(self.template);
        }
        vm.memory = vm.memory.or(self.memory);
        vm.cpus = vm.cpus.or(self.cpus);
        if vm.net == Default::default() {
            vm.net.policy = self.network;
        }
        args.job.timeout = args.job.timeout.or(self.timeout);
        args.job.limit_pids = args.job.limit_pids.or(self.limit_pids);
        args.job.limit_memory = args.job.limit_memory.or(self.limit_memory);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Command};

    fn run(args: &[&str]) -> Box<RunArgs> {
        let line = [&["dev-box", "run"], args, &["--", "agent"]].concat();
        let Command::Run(args) = Cli::try_parse_from(line).unwrap().command else { panic!("not run") };
        args
    }

    #[test]
    fn the_built_in_ones_are_sound_and_let_only_names_out() {
        for (name, _) in BUILT_IN {
            let profile = Profile::find(name).unwrap();
            assert!(!profile.credentials.is_empty(), "{name}");
            let network = profile.network.clone().unwrap_or_default();
            assert!(
                matches!(&network, EgressPolicy::Custom(policy) if !policy.domains().is_empty()),
                "{name}"
            );
            let mut args = run(&[]);
            profile.clone().apply(name, &mut args, |_| true).unwrap();
            assert_eq!(args.vm.net.policy, profile.network, "{name}");
            let error = profile.apply(name, &mut run(&[]), |_| false).unwrap_err().to_string();
            assert!(error.contains("_"), "{name}: {error}");
        }
    }

    #[test]
    fn the_command_line_wins() {
        let text = "image = 'i'\nmemory = '1GiB'\ncpus = 2\ntimeout = '2h'\nlimit-pids = 9\nenv-from-host = ['A', 'B']\n\
                    [env]\nC = '1'\nD = '2'\n[network]\nmode = 'isolated'\n";
        let profile = Profile::parse("p", text).unwrap();
        let mut args = run(&["--memory", "3GiB", "--env", "A=x", "--env", "D=9", "--timeout", "5m"]);
        profile.clone().apply("p", &mut args, |name| name == "A" || name == "B").unwrap();
        assert_eq!((args.vm.memory, args.vm.cpus), (Some(ByteSize::gib(3)), Some(2)));
        assert_eq!((args.job.timeout, args.job.limit_pids), (Some(Duration::from_secs(300)), Some(9)));
        assert_eq!(args.job.env_from_host, ["B"]);
        let expected =
            [("C", "1"), ("A", "x"), ("D", "9")].map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(args.job.env, expected);
        assert_eq!(
            (args.vm.image.as_deref(), args.vm.net.policy.clone()),
            (Some("i"), Some(EgressPolicy::Isolated))
        );
        let mut args = run(&["--net", "isolated"]);
        profile.apply("p", &mut args, |_| false).unwrap();
        assert_eq!(args.vm.net.policy, None);
    }

    #[test]
    fn mistakes_are_told() {
        let unknown = Profile::find("cluade").unwrap_err().to_string();
        assert!(unknown.contains("claude, codex and copilot"), "{unknown}");
        assert!(matches!(Profile::find("./no/such.toml"), Err(ProfileError::Read { .. })));
        assert!(matches!(Profile::parse("p", "memroy = '1GiB'"), Err(ProfileError::Malformed { .. })));
        assert!(matches!(Profile::parse("p", "timeout = 'long'"), Err(ProfileError::Malformed { .. })));
    }
}
