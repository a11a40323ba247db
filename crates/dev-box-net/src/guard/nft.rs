//! [`Firewall`] by the program `nft`.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{self, ErrorKind, Write as _};
use std::net::Ipv4Addr;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;

use super::generation::Changes;
use super::memory::Memory;
use super::network_rules::NFT_TABLE;
use super::render::{FAMILIES, TABLE, render_entries, render_forget_reached};
use super::{
    FilterRules, Fingerprint, Firewall, FirewallError, NetworkRules, Traffic, VmGuard, filters, listing,
    render_apply, render_clear, render_remove,
};
use crate::network::NetworkShape;

/// How much of nft's complaint is kept, in characters.
const MAX_MESSAGE: usize = 1000;

/// Libvirt's filters, and the mark of all that there is of them.
type Filters = (BTreeMap<Ipv4Addr, FilterRules>, u64);

/// What is remembered of the rules.
#[derive(Debug, Default)]
struct Known {
    ours: Memory<BTreeMap<Ipv4Addr, Fingerprint>>,
    filters: Memory<Filters>,
    network: Memory<(NetworkShape, NetworkRules)>,
}

/// Runs `nft`, `ebtables-save` and `iptables-save`.
#[derive(Debug, Clone)]
pub struct NftFirewall {
    nft: Vec<OsString>,
    ebtables_save: Vec<OsString>,
    iptables_save: Vec<OsString>,
    /// `None` where the programs may see another network namespace than we do.
    known: Option<Arc<Known>>,
}

impl Default for NftFirewall {
    fn default() -> Self {
        Self::with_commands(&["nft"], &["ebtables-save"], &["iptables-save"]).here()
    }
}

impl NftFirewall {
    /// Runs other commands, to which the programs' arguments are added, as `ip netns exec NAME nft`.
    pub fn with_commands(nft: &[&str], ebtables_save: &[&str], iptables_save: &[&str]) -> Self {
        let words = |command: &[&str]| command.iter().map(OsString::from).collect();
        Self {
            nft: words(nft),
            ebtables_save: words(ebtables_save),
            iptables_save: words(iptables_save),
            known: None,
        }
    }

    /// The same, for programs that see the network namespace of the thread that asks: rules are not listed again while the
    /// kernel's have not changed.
    #[must_use]
    pub fn here(self) -> Self {
        Self { known: Some(Arc::default()), ..self }
    }

    fn run(&self, what: &str, arguments: &[&str], input: &str) -> Result<String, FirewallError> {
        run(&self.nft, what, arguments, input)
    }

    fn change(&self, what: &str, script: &str) -> Result<(), FirewallError> {
        self.run(what, &["-f", "-"], script).map(drop)
    }

    /// Makes a change of a VM's rules whose entries in the maps may lead somewhere else by somebody's doing: nft adds no entry
    /// beside another one, so these go first then. In between the VM has no entry, and its packets are dropped.
    fn clearing_the_way<T>(
        &self,
        address: Ipv4Addr,
        change: impl Fn() -> Result<T, FirewallError>,
    ) -> Result<T, FirewallError> {
        match change() {
            Err(FirewallError::Refused { message, .. }) if message.contains("File exists") => {
                for entry in render_entries(address) {
                    // Most are not there.
                    let _ = self.change("to remove an entry", &entry);
                }
                change()
            }
            done => done,
        }
    }

    /// Changes rules, and lists what stands then. When nft ends, the kernel has it wait until what was replaced is freed (a grace
    /// period of RCU, longer than all that nft does): the listing goes on meanwhile, from the moment that the change
    /// is in force.
    fn change_and_list(
        &self,
        what: &str,
        script: &str,
    ) -> Result<BTreeMap<Ipv4Addr, Fingerprint>, FirewallError> {
        let changes = self.changes();
        let running = Running::start(&self.nft, what, &["-f", "-"], script)?;
        if changes.as_ref().and_then(|changes| changes.wait_for(&running.child)).is_some() {
            let found = self.fingerprints();
            running.end()?;
            return found;
        }
        running.end()?;
        self.fingerprints()
    }

    /// Hears of changes; `None` where the programs may see another network namespace, or none are told.
    fn changes(&self) -> Option<Changes> {
        self.known.as_ref()?;
        let deaf = |error: &io::Error| tracing::debug!(%error, "changes of nftables cannot be heard of");
        Changes::listen().inspect_err(deaf).ok()
    }

    /// All tables, or of all of them what `WHAT table` lists; an absent one is an empty listing. (One run for all of them lists
    /// nothing in nft 1.0.6.)
    fn tables(&self, what: &[&str]) -> Result<listing::Tables, FirewallError> {
        let texts: Vec<Result<Option<String>, FirewallError>> = thread::scope(|scope| {
            let runs = FAMILIES.map(|family| scope.spawn(move || self.table(what, [family, TABLE])));
            runs.into_iter().map(|run| run.join().unwrap_or_else(|_| lost())).collect()
        });
        let mut tables = listing::Tables::default();
        for text in texts {
            if let Some(text) = text? {
                tables.read(&text)?;
            }
        }
        Ok(tables)
    }

    /// A table's listing; `None` for an absent one.
    fn table(&self, what: &[&str], [family, name]: [&str; 2]) -> Result<Option<String>, FirewallError> {
        let arguments = [&["-j", "list"], what, &["table", family, name]].concat();
        match self.run("to list a table", &arguments, "") {
            Ok(text) => Ok(Some(text)),
            Err(FirewallError::Refused { message, .. }) if message.contains("No such file or directory") => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// What libvirt's rules for the network are, and whether changes of them are counted.
    fn look_at_network(&self, shape: &NetworkShape) -> Result<(NetworkRules, bool), FirewallError> {
        let (iptables, nft) = thread::scope(|scope| {
            let nft = scope.spawn(|| self.table(&[], NFT_TABLE));
            let iptables = match run(&self.iptables_save, "to list libvirt's rules", &[], "") {
                // Not everybody has it who has libvirt with nftables.
                Err(FirewallError::NotInstalled { .. }) => Ok(String::new()),
                listed => listed,
            };
            (iptables, nft.join().unwrap_or_else(|_| lost()))
        });
        let iptables = iptables?;
        let counted = iptables.is_empty() || is_counted(&iptables);
        Ok((NetworkRules::read(&iptables, nft?.as_deref(), shape)?, counted))
    }

    /// What stands for every address that has rules.
    fn fingerprints(&self) -> Result<BTreeMap<Ipv4Addr, Fingerprint>, FirewallError> {
        let look = || Ok((self.tables(&[])?.fingerprints(), true));
        match &self.known {
            Some(known) => known.ours.get(|_| true, look),
            None => look().map(|(found, _)| found),
        }
    }

    /// What libvirt's filters are, and whether changes of them are counted.
    fn look_at_filters(&self) -> Result<(Filters, bool), FirewallError> {
        let listing = run(&self.ebtables_save, "to list libvirt's filters", &["-t", "nat"], "")?;
        Ok(((filters::read(&listing)?, filters::mark(&listing)), is_counted(&listing)))
    }

    fn all_filters(&self) -> Result<Filters, FirewallError> {
        let look = || self.look_at_filters();
        match &self.known {
            Some(known) => known.filters.get(|_| true, look),
            None => look().map(|(found, _)| found),
        }
    }
}

impl Firewall for NftFirewall {
    fn apply(&self, guard: &VmGuard) -> Result<Fingerprint, FirewallError> {
        let (address, tap) = (guard.address(), guard.tap());
        let (what, script) = (format!("the rules of {tap}"), render_apply(guard));
        self.clearing_the_way(address, || self.change_and_list(&what, &script))?
            .remove(&address)
            .ok_or_else(|| FirewallError::Listing(format!("the rules of {tap} are not in it")))
    }

    fn remove(&self, address: Ipv4Addr) -> Result<(), FirewallError> {
        let (what, script) = (format!("to remove the rules of {address}"), render_remove(address));
        self.clearing_the_way(address, || self.change(&what, &script))
    }

    fn list(&self) -> Result<Vec<Ipv4Addr>, FirewallError> {
        Ok(self.fingerprints()?.into_keys().collect())
    }

    fn inspect(&self, addresses: &[Ipv4Addr]) -> Result<BTreeMap<Ipv4Addr, Fingerprint>, FirewallError> {
        let mut found = self.fingerprints()?;
        found.retain(|address, _| addresses.contains(address));
        Ok(found)
    }

    fn traffic(&self) -> Result<BTreeMap<Ipv4Addr, Traffic>, FirewallError> {
        // The rules are several times as much to list and to read.
        Ok(self.tables(&["counters"])?.traffic())
    }

    fn filters(&self) -> Result<BTreeMap<Ipv4Addr, FilterRules>, FirewallError> {
        Ok(self.all_filters()?.0)
    }

    fn filters_mark(&self) -> Result<Option<u64>, FirewallError> {
        Ok(Some(self.all_filters()?.1))
    }

    fn network_rules(&self, shape: &NetworkShape) -> Result<NetworkRules, FirewallError> {
        let look = || self.look_at_network(shape).map(|(rules, counted)| ((shape.clone(), rules), counted));
        match &self.known {
            Some(known) => known.network.get(|(of, _)| of == shape, look).map(|(_, rules)| rules),
            None => look().map(|((_, rules), _)| rules),
        }
    }

    fn forget_reached(&self, address: Ipv4Addr, ipv6: bool) -> Result<(), FirewallError> {
        let changes = self.changes();
        let script = render_forget_reached(address, ipv6);
        let running = Running::start(&self.nft, "to forget what a VM reached", &["-f", "-"], &script)?;
        let Some((changes, change)) =
            changes.and_then(|heard| heard.wait_for(&running.child).map(|of| (heard, of)))
        else {
            return running.end().map(drop);
        };
        // What packets left in sets is no rule.
        if let Some(Known { ours, filters, network }) = self.known.as_deref() {
            ours.survives(change);
            filters.survives(change);
            network.survives(change);
        }
        // In force. All that is left is the kernel's wait until what was there is freed, and a VM stands still for this.
        thread::Builder::new().spawn(move || {
            let _ = running.end();
            drop(changes);
        })?;
        Ok(())
    }

    fn forget(&self) {
        if let Some(Known { ours, filters, network }) = self.known.as_deref() {
            ours.forget();
            filters.forget();
            network.forget();
        }
    }

    fn clear(&self) -> Result<(), FirewallError> {
        self.change("to remove the tables", &render_clear())
    }
}

/// Whether what iptables-save or ebtables-save lists is nftables', whose changes the kernel counts. The older ones' are not.
fn is_counted(listing: &str) -> bool {
    listing.lines().next().is_some_and(|line| line.contains("(nf_tables)"))
}

fn lost<T>() -> Result<T, FirewallError> {
    Err(io::Error::other("a thread that lists a table ended").into())
}

/// Runs a command to its end; what it prints.
fn run(command: &[OsString], what: &str, arguments: &[&str], input: &str) -> Result<String, FirewallError> {
    Running::start(command, what, arguments, input)?.end()
}

/// A command that has all its input.
struct Running<'a> {
    what: &'a str,
    child: Child,
}

impl<'a> Running<'a> {
    fn start(
        command: &[OsString],
        what: &'a str,
        arguments: &[&str],
        input: &str,
    ) -> Result<Self, FirewallError> {
        let (program, first) =
            command.split_first().ok_or_else(|| io::Error::from(ErrorKind::InvalidInput))?;
        let mut command = Command::new(program);
        let mut child = command
            .args(first)
            .args(arguments)
            .env("LC_ALL", "C")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|source| match source.kind() {
                ErrorKind::NotFound => {
                    FirewallError::NotInstalled { program: program.to_string_lossy().into_owned(), source }
                }
                _ => FirewallError::Io(source),
            })?;
        if let Some(mut stdin) = child.stdin.take()
            && let Err(error) = stdin.write_all(input.as_bytes())
            && error.kind() != ErrorKind::BrokenPipe
        {
            // A pipe that closed early is explained by the exit status below.
            return Err(error.into());
        }
        Ok(Self { what, child })
    }

    fn end(self) -> Result<String, FirewallError> {
        let output = self.child.wait_with_output()?;
        if output.status.success() {
            return String::from_utf8(output.stdout)
                .map_err(|error| FirewallError::Listing(error.to_string()));
        }
        let message: String =
            String::from_utf8_lossy(&output.stderr).trim().chars().take(MAX_MESSAGE).collect();
        if message.contains("Operation not permitted") {
            return Err(FirewallError::NotPermitted { message });
        }
        Err(FirewallError::Refused { what: self.what.to_owned(), message })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn script(text: &str) -> NftFirewall {
        let command = ["sh", "-c", text, "nft"];
        NftFirewall::with_commands(&command, &command, &command)
    }

    #[test]
    fn a_missing_program_names_the_package() {
        let error = NftFirewall::with_commands(&["/nonexistent/nft"], &[], &[]).clear().unwrap_err();
        assert!(matches!(&error, FirewallError::NotInstalled { .. }), "{error:?}");
        assert!(error.to_string().contains("install the packages nftables"));
    }

    #[test]
    fn a_program_that_cannot_be_run_is_an_error_of_io() {
        for command in [&["/"][..], &[]] {
            let firewall = NftFirewall::with_commands(command, command, command);
            assert!(matches!(firewall.clear(), Err(FirewallError::Io(_))));
            assert!(matches!(firewall.filters(), Err(FirewallError::Io(_))));
        }
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
        assert!(script("exit 0").filters().unwrap().is_empty());
        assert!(absent.inspect(&[Ipv4Addr::LOCALHOST]).unwrap().is_empty());
        assert!(matches!(script("echo nonsense").list(), Err(FirewallError::Listing(_))));
        assert!(matches!(script("echo nonsense").filters(), Err(FirewallError::Listing(_))));
        assert!(matches!(script("exit 1").filters(), Err(FirewallError::Refused { .. })));
        let forgotten = absent.forget_reached(Ipv4Addr::LOCALHOST, false);
        assert!(
            matches!(forgotten, Err(FirewallError::Refused { .. })),
            "nobody's audit is whole without rules"
        );
        assert!(matches!(script("printf '\\377'").list(), Err(FirewallError::Listing(_))));
    }

    /// In a network namespace of this thread's own, with the real kernel and nft.
    #[test]
    fn a_change_is_heard_of_before_nft_has_ended_and_nothing_else_is() {
        use nix::sched::{CloneFlags, unshare};
        if Command::new("nft").arg("--version").output().is_err()
            || unshare(CloneFlags::CLONE_NEWNET).is_err()
        {
            eprintln!("SKIPPED: needs root, and nft");
            return;
        }
        let nft = [OsString::from("nft")];
        let heard = |script: &str| {
            let changes = Changes::listen().unwrap();
            let running = Running::start(&nft, "a test", &["-f", "-"], script).unwrap();
            let heard = changes.wait_for(&running.child).is_some();
            (heard, running.end().is_ok())
        };
        assert_eq!(heard("add table inet a\n"), (true, true));
        assert_eq!(heard("list tables\n"), (false, true), "no change");
        assert_eq!(heard("delete table inet b\n"), (false, false), "refused");

        // Another's is not taken for it, however many there are: a full buffer loses some, and the end is seen.
        let changes = Changes::listen().unwrap();
        let others: String = (0..300).map(|n| format!("add table inet t{n}\n")).collect();
        Running::start(&nft, "others", &["-f", "-"], &others).unwrap().end().unwrap();
        let running = Running::start(&nft, "a test", &["list", "tables"], "").unwrap();
        assert_eq!(changes.wait_for(&running.child), None);
        running.end().unwrap();
    }
}
