//! [`Firewall`] by the program `nft`.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{self, ErrorKind, Write as _};
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};
use std::thread;

use super::render::{FAMILIES, TABLE, render_entries};
use super::{
    FilterRules, Fingerprint, Firewall, FirewallError, Traffic, VmGuard, filters, listing, render_apply,
    render_clear, render_remove,
};

/// How much of nft's complaint is kept, in characters.
const MAX_MESSAGE: usize = 1000;

/// Runs `nft`, one process a call.
#[derive(Debug, Clone)]
pub struct NftFirewall {
    program: OsString,
    arguments: Vec<OsString>,
}

impl Default for NftFirewall {
    fn default() -> Self {
        Self::with_command("nft", [])
    }
}

impl NftFirewall {
    /// Runs another command that takes nft's arguments after `arguments`, as `ip netns exec NAME nft`.
    pub fn with_command<const N: usize>(program: &str, arguments: [&str; N]) -> Self {
        let arguments = arguments.into_iter().map(OsString::from).collect();
        Self { program: program.into(), arguments }
    }

    fn run(&self, what: &str, arguments: &[&str], input: &str) -> Result<String, FirewallError> {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).args(arguments);
        run(command, what, input)
    }

    fn change(&self, what: &str, script: &str) -> Result<(), FirewallError> {
        self.run(what, &["-f", "-"], script).map(drop)
    }

    /// As [`Self::change`], for a VM whose entries in the maps may lead somewhere else by somebody's doing: nft adds no entry
    /// beside another one, so these go first. In between the VM has no entry, and its packets are dropped.
    fn change_of(&self, address: Ipv4Addr, what: &str, script: &str) -> Result<(), FirewallError> {
        match self.change(what, script) {
            Err(FirewallError::Refused { message, .. }) if message.contains("File exists") => {
                for entry in render_entries(address) {
                    // Most are not there.
                    let _ = self.change("to remove an entry", &entry);
                }
                self.change(what, script)
            }
            done => done,
        }
    }

    /// All tables; an absent one is an empty listing. (One run for all of them lists nothing in nft 1.0.6.)
    fn tables(&self) -> Result<listing::Tables, FirewallError> {
        let texts: Vec<Result<String, FirewallError>> = thread::scope(|scope| {
            let runs = FAMILIES.map(|family| {
                scope.spawn(move || self.run("to list a table", &["-j", "list", "table", family, TABLE], ""))
            });
            let lost = || Err(io::Error::other("a thread that lists a table ended").into());
            runs.into_iter().map(|run| run.join().unwrap_or_else(|_| lost())).collect()
        });
        let mut tables = listing::Tables::default();
        for text in texts {
            match text {
                Ok(text) => tables.read(&text)?,
                Err(FirewallError::Refused { message, .. })
                    if message.contains("No such file or directory") => {}
                Err(error) => return Err(error),
            }
        }
        Ok(tables)
    }
}

impl Firewall for NftFirewall {
    fn apply(&self, guard: &VmGuard) -> Result<Fingerprint, FirewallError> {
        let address = guard.address();
        self.change_of(address, &format!("the rules of {}", guard.tap()), &render_apply(guard))?;
        self.inspect(&[address])?
            .remove(&address)
            .ok_or_else(|| FirewallError::Listing(format!("the rules of {} are not in it", guard.tap())))
    }

    fn remove(&self, address: Ipv4Addr) -> Result<(), FirewallError> {
        self.change_of(address, &format!("to remove the rules of {address}"), &render_remove(address))
    }

    fn list(&self) -> Result<Vec<Ipv4Addr>, FirewallError> {
        Ok(self.tables()?.addresses())
    }

    fn inspect(&self, addresses: &[Ipv4Addr]) -> Result<BTreeMap<Ipv4Addr, Fingerprint>, FirewallError> {
        let tables = self.tables()?;
        Ok(addresses
            .iter()
            .filter_map(|address| tables.fingerprint(*address).map(|fingerprint| (*address, fingerprint)))
            .collect())
    }

    fn traffic(&self) -> Result<BTreeMap<Ipv4Addr, Traffic>, FirewallError> {
        Ok(self.tables()?.traffic())
    }

    fn filters(&self) -> Result<BTreeMap<Ipv4Addr, FilterRules>, FirewallError> {
        match self.run("to list libvirt's filters", &["-j", "list", "table", "bridge", "nat"], "") {
            Ok(text) => filters::read(&text),
            Err(FirewallError::Refused { message, .. }) if message.contains("No such file or directory") => {
                Ok(BTreeMap::new())
            }
            Err(error) => Err(error),
        }
    }

    fn clear(&self) -> Result<(), FirewallError> {
        self.change("to remove the tables", &render_clear())
    }
}

/// Runs a command to its end; what it prints.
fn run(mut command: Command, what: &str, input: &str) -> Result<String, FirewallError> {
    let mut child = command
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|source| match source.kind() {
            ErrorKind::NotFound => FirewallError::NotInstalled {
                program: command.get_program().to_string_lossy().into_owned(),
                source,
            },
            _ => FirewallError::Io(source),
        })?;
    if let Some(mut stdin) = child.stdin.take()
        && let Err(error) = stdin.write_all(input.as_bytes())
        && error.kind() != ErrorKind::BrokenPipe
    {
        // A pipe that closed early is explained by the exit status below.
        return Err(error.into());
    }
    let output = child.wait_with_output()?;
    if output.status.success() {
        return String::from_utf8(output.stdout).map_err(|error| FirewallError::Listing(error.to_string()));
    }
    let message: String = String::from_utf8_lossy(&output.stderr).trim().chars().take(MAX_MESSAGE).collect();
    if message.contains("Operation not permitted") {
        return Err(FirewallError::NotPermitted { message });
    }
    Err(FirewallError::Refused { what: what.to_owned(), message })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn script(text: &str) -> NftFirewall {
        NftFirewall::with_command("sh", ["-c", text, "nft"])
    }

    #[test]
    fn a_missing_program_names_the_package() {
        let error = NftFirewall::with_command("/nonexistent/nft", []).clear().unwrap_err();
        assert!(matches!(&error, FirewallError::NotInstalled { .. }), "{error:?}");
        assert!(error.to_string().contains("install the packages nftables"));
    }

    #[test]
    fn a_program_that_cannot_be_run_is_an_error_of_io() {
        assert!(matches!(NftFirewall::with_command("/", []).clear(), Err(FirewallError::Io(_))));
    }

    #[test]
    fn refusals_carry_the_text_of_nft() {
        let error = script("cat >/dev/null; echo 'Error: syntax' >&2; exit 1").clear().unwrap_err();
        assert_eq!(error.to_string(), "nft refused to remove the tables: Error: syntax");
        let error =
            script("echo 'Operation not permitted (you must be root)' >&2; exit 1").clear().unwrap_err();
        assert!(matches!(&error, FirewallError::NotPermitted { .. }), "{error:?}");
        let error = script("yes x | head -c 5000 >&2; exit 1").list().unwrap_err();
        assert!(error.to_string().len() < MAX_MESSAGE + 100);
    }

    #[test]
    fn absent_tables_are_empty_and_garbage_is_refused() {
        let absent = script("echo 'Error: No such file or directory' >&2; exit 1");
        assert!(absent.list().unwrap().is_empty());
        assert!(absent.traffic().unwrap().is_empty());
        assert!(absent.filters().unwrap().is_empty());
        assert!(absent.inspect(&[Ipv4Addr::LOCALHOST]).unwrap().is_empty());
        assert!(matches!(script("echo nonsense").list(), Err(FirewallError::Listing(_))));
        assert!(matches!(script("echo nonsense").filters(), Err(FirewallError::Listing(_))));
        assert!(matches!(script("exit 1").filters(), Err(FirewallError::Refused { .. })));
        assert!(matches!(script("printf '\\377'").list(), Err(FirewallError::Listing(_))));
    }
}
