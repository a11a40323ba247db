//! Which network a VM gets: the same on the command line and in a request to the daemon.

use std::path::PathBuf;

use clap::{Args, ValueHint};
use dev_box::DevBox;
use dev_box::core::spec::NetworkMode;
use dev_box::net::EgressPolicy;
use dev_box::net::policy::{PolicyStoreError, store};
use serde::{Deserialize, Serialize};

/// A name, or a policy in full. Written as `"isolated"`, or as the policy's own document.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args, Serialize, Deserialize)]
#[serde(from = "Written", into = "Written")]
pub(crate) struct NetArgs {
    /// nat-filtered (out: DNS, HTTP, HTTPS, SSH, git, to public addresses only; in: nothing), isolated (no network interface
    /// at all), or a policy of /etc/dev-box/policies by its name.
    #[arg(long, value_name = "NAME", default_value = "nat-filtered", value_parser = network)]
    pub(crate) net: NetworkMode,

    /// The policy in this file instead.
    #[arg(long, value_name = "FILE", conflicts_with = "net", value_parser = policy, value_hint = ValueHint::FilePath)]
    pub(crate) policy: Option<EgressPolicy>,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Written {
    Name(NetworkMode),
    Policy(EgressPolicy),
}

impl From<Written> for NetArgs {
    fn from(written: Written) -> Self {
        match written {
            Written::Name(net) => Self { net, policy: None },
            Written::Policy(policy) => Self { policy: Some(policy), ..Self::default() },
        }
    }
}

impl From<NetArgs> for Written {
    fn from(args: NetArgs) -> Self {
        args.policy.map_or(Self::Name(args.net), Self::Policy)
    }
}

impl NetArgs {
    /// What is asked for; a policy in full is taken along.
    ///
    /// # Errors
    /// There are too many of them.
    pub(crate) fn mode(&self, dev_box: &DevBox) -> Result<NetworkMode, PolicyStoreError> {
        match &self.policy {
            Some(policy) => dev_box.policies().bring(policy.clone()),
            None => Ok(self.net.clone()),
        }
    }
}

fn network(word: &str) -> Result<NetworkMode, String> {
    let plain = word.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
    if word.is_empty() || !plain {
        return Err(
            "expected nat-filtered, isolated, or the name of a policy (for a file: --policy)".to_owned()
        );
    }
    Ok(NetworkMode::from_word(word))
}

/// The file's policy; what is wrong with it comes with its line.
fn policy(path: &str) -> Result<EgressPolicy, String> {
    store::read(PathBuf::from(path)).map_err(|error| crate::exit::Failure::new(error).to_string())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        net: NetArgs,
    }

    fn parse(args: &[&str]) -> Result<NetArgs, clap::Error> {
        Line::try_parse_from([&["x"], args].concat()).map(|line| line.net)
    }

    #[test]
    fn a_network_is_a_name_or_a_file() {
        assert_eq!(parse(&[]).unwrap(), NetArgs::default());
        assert_eq!(parse(&["--net", "isolated"]).unwrap().net, NetworkMode::Isolated);
        assert_eq!(parse(&["--net", "web"]).unwrap().net, NetworkMode::Named("web".to_owned()));
        assert!(parse(&["--net", "a/b"]).is_err());
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("p.toml");
        std::fs::write(&file, "mode = 'custom'\nports = ['tcp/443']\n").unwrap();
        let file = file.to_str().unwrap();
        assert_eq!(parse(&["--policy", file]).unwrap().policy.unwrap().ports().len(), 1);
        assert!(parse(&["--net", "web", "--policy", file]).is_err());
        std::fs::write(file, "mode = 'custom'\ndomains = [\n 'github.com',\n '1.2.3.4',\n]\n").unwrap();
        let error = parse(&["--policy", file]).unwrap_err().to_string();
        assert!(
            error.contains("line 4, domains[1]") && error.contains("an IP address is not a domain"),
            "{error}"
        );
    }

    #[test]
    fn what_is_written_is_read_back() {
        let named = NetArgs { net: NetworkMode::Named("web".to_owned()), policy: None };
        let full = NetArgs {
            policy: Some(EgressPolicy::from_toml("mode = 'custom'\nports = ['tcp/443']").unwrap()),
            ..NetArgs::default()
        };
        assert_eq!(serde_json::to_string(&named).unwrap(), "\"web\"");
        for args in [named, full, NetArgs::default()] {
            let text = serde_json::to_string(&args).unwrap();
            assert_eq!(serde_json::from_str::<NetArgs>(&text).unwrap(), args, "{text}");
        }
    }
}
