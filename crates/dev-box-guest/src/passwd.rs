//! Users and groups read straight from `/etc/passwd` and `/etc/group` (passwd(5), group(5)).
//!
//! The program is linked statically, so the C library's name service is not there. The files belong to the guest and
//! may hold anything: lines that do not parse are skipped, as the C library does, and nothing here panics.

use std::path::Path;

/// Upper bound of either file's size that is read, in bytes.
pub const MAX_FILE_BYTES: u64 = 4 * 1024 * 1024;

/// Supplementary groups given to a process at most (the kernel's `NGROUPS_MAX` is 65536; nobody needs that many).
pub const MAX_GROUPS: usize = 1024;

/// Why a user could not be found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PasswdError {
    /// No such user.
    #[error("user `{0}` is not in the guest's /etc/passwd")]
    UnknownUser(String),
    /// No such group.
    #[error("group `{0}` is not in the guest's /etc/group")]
    UnknownGroup(String),
    /// The specification is empty or holds an empty half.
    #[error("`{0}` is not a user: give NAME, UID, NAME:GROUP or UID:GID")]
    Malformed(String),
}

/// The credentials and surroundings of a process about to be started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Login name; the number as text when the user has no entry.
    pub name: String,
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Supplementary group ids, sorted, the primary one included.
    pub groups: Vec<u32>,
    /// Home directory, `/` when unknown.
    pub home: Vec<u8>,
    /// Login shell, `/bin/sh` when unknown.
    pub shell: Vec<u8>,
}

impl Identity {
    /// Root as it is when `/etc/passwd` says nothing.
    #[must_use]
    pub fn root() -> Self {
        Self {
            name: "root".into(),
            uid: 0,
            gid: 0,
            groups: vec![0],
            home: b"/root".to_vec(),
            shell: b"/bin/sh".to_vec(),
        }
    }
}

/// The text of both files.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Accounts {
    passwd: Vec<u8>,
    group: Vec<u8>,
}

/// One line of `/etc/passwd`, the password left out.
#[derive(Debug, Clone, PartialEq, Eq)]
struct User<'a> {
    name: &'a [u8],
    uid: u32,
    gid: u32,
    home: &'a [u8],
    shell: &'a [u8],
}

impl Accounts {
    /// From the files' text.
    #[must_use]
    pub fn new(passwd: Vec<u8>, group: Vec<u8>) -> Self {
        Self { passwd, group }
    }

    /// From `etc/passwd` and `etc/group` beneath `root`; a file that is missing or larger than [`MAX_FILE_BYTES`] counts as empty.
    #[must_use]
    pub fn read(root: &Path) -> Self {
        Self { passwd: read_bounded(&root.join("etc/passwd")), group: read_bounded(&root.join("etc/group")) }
    }

    /// Finds who `spec` means: `NAME`, `UID`, `NAME:GROUP` or `UID:GID`.
    ///
    /// A number without an entry is taken as it is, its group being the same number. An explicit group replaces the primary
    /// one and drops the supplementary ones.
    ///
    /// # Errors
    /// [`PasswdError`] when a name is not in the files or the specification is empty.
    pub fn resolve(&self, spec: &str) -> Result<Identity, PasswdError> {
        let (user_part, group_part) = match spec.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (spec, None),
        };
        if user_part.is_empty() || group_part == Some("") {
            return Err(PasswdError::Malformed(spec.to_owned()));
        }
        let mut identity = self.identity_of(user_part)?;
        if let Some(group) = group_part {
            identity.gid = self.gid_of(group)?;
            identity.groups = vec![identity.gid];
        }
        Ok(identity)
    }

    fn identity_of(&self, wanted: &str) -> Result<Identity, PasswdError> {
        let number = wanted.parse::<u32>().ok();
        let found = users(&self.passwd)
            .find(|user| user.name == wanted.as_bytes())
            .or_else(|| users(&self.passwd).find(|user| Some(user.uid) == number));
        let Some(user) = found else {
            return match number {
                Some(0) => Ok(Identity::root()),
                Some(uid) => Ok(Identity {
                    name: wanted.to_owned(),
                    uid,
                    gid: uid,
                    groups: vec![uid],
                    home: b"/".to_vec(),
                    shell: b"/bin/sh".to_vec(),
                }),
                None if wanted == "root" => Ok(Identity::root()),
                None => Err(PasswdError::UnknownUser(wanted.to_owned())),
            };
        };
        Ok(Identity {
            name: String::from_utf8_lossy(user.name).into_owned(),
            uid: user.uid,
            gid: user.gid,
            groups: self.groups_of(user.name, user.gid),
            home: if user.home.is_empty() { b"/".to_vec() } else { user.home.to_vec() },
            shell: if user.shell.is_empty() { b"/bin/sh".to_vec() } else { user.shell.to_vec() },
        })
    }

    fn gid_of(&self, wanted: &str) -> Result<u32, PasswdError> {
        groups(&self.group)
            .find(|(name, ..)| *name == wanted.as_bytes())
            .map(|(_, gid, _)| gid)
            .or_else(|| wanted.parse().ok())
            .ok_or_else(|| PasswdError::UnknownGroup(wanted.to_owned()))
    }

    fn groups_of(&self, user: &[u8], primary: u32) -> Vec<u32> {
        let mut found = vec![primary];
        for (_, gid, members) in groups(&self.group) {
            if members.split(|byte| *byte == b',').any(|member| member == user) {
                found.push(gid);
            }
        }
        found.sort_unstable();
        found.dedup();
        found.truncate(MAX_GROUPS);
        found
    }
}

fn read_bounded(path: &Path) -> Vec<u8> {
    use std::io::Read as _;
    let mut text = Vec::new();
    let read =
        std::fs::File::open(path).and_then(|file| file.take(MAX_FILE_BYTES + 1).read_to_end(&mut text));
    match read {
        Ok(length) if length as u64 <= MAX_FILE_BYTES => text,
        _ => Vec::new(),
    }
}

fn number(field: &[u8]) -> Option<u32> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

fn users(text: &[u8]) -> impl Iterator<Item = User<'_>> {
    text.split(|byte| *byte == b'\n').filter_map(|line| {
        let mut fields = line.split(|byte| *byte == b':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let _password = fields.next()?;
        let uid = number(fields.next()?)?;
        let gid = number(fields.next()?)?;
        let _comment = fields.next()?;
        let home = fields.next()?;
        Some(User { name, uid, gid, home, shell: fields.next().unwrap_or_default() })
    })
}

fn groups(text: &[u8]) -> impl Iterator<Item = (&[u8], u32, &[u8])> {
    text.split(|byte| *byte == b'\n').filter_map(|line| {
        let mut fields = line.split(|byte| *byte == b':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let _password = fields.next()?;
        let gid = number(fields.next()?)?;
        Some((name, gid, fields.next().unwrap_or_default()))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample() -> Accounts {
        Accounts::new(
            b"root:x:0:0:root:/root:/bin/bash\n# junk\nagent:x:1000:1000:,,,:/home/agent:/bin/bash\nbare:x:7:8::\nodd:x:9:9:::\n"
                .to_vec(),
            b"root:x:0:\nagent:x:1000:\nsudo:x:27:agent,other\ndocker:x:999:agent\nbroken:x:no:agent\n".to_vec(),
        )
    }

    #[test]
    fn a_name_brings_its_groups_home_and_shell() {
        let found = sample().resolve("agent").unwrap();
        assert_eq!((found.uid, found.gid), (1000, 1000));
        assert_eq!(found.groups, [27, 999, 1000]);
        assert_eq!(found.home, b"/home/agent");
        assert_eq!(found.shell, b"/bin/bash");
    }

    #[test]
    fn a_number_finds_its_entry_or_stands_for_itself() {
        assert_eq!(sample().resolve("1000").unwrap().name, "agent");
        let stranger = sample().resolve("4242").unwrap();
        assert_eq!((stranger.uid, stranger.gid, stranger.groups), (4242, 4242, vec![4242]));
        assert_eq!(stranger.home, b"/");
    }

    #[test]
    fn an_explicit_group_replaces_all() {
        let found = sample().resolve("agent:sudo").unwrap();
        assert_eq!((found.gid, found.groups), (27, vec![27]));
        assert_eq!(sample().resolve("7:55").unwrap().gid, 55);
    }

    #[test]
    fn empty_fields_have_defaults_and_root_always_exists() {
        let odd = sample().resolve("odd").unwrap();
        assert_eq!((odd.home.as_slice(), odd.shell.as_slice()), (b"/".as_slice(), b"/bin/sh".as_slice()));
        let empty = Accounts::default();
        assert_eq!(empty.resolve("root").unwrap(), Identity::root());
        assert_eq!(empty.resolve("0").unwrap(), Identity::root());
    }

    #[test]
    fn what_is_missing_is_named() {
        assert_eq!(sample().resolve("nobody"), Err(PasswdError::UnknownUser("nobody".into())));
        assert_eq!(sample().resolve("agent:wheel"), Err(PasswdError::UnknownGroup("wheel".into())));
        for malformed in ["", ":", "agent:", ":5"] {
            assert_eq!(sample().resolve(malformed), Err(PasswdError::Malformed(malformed.into())));
        }
    }

    #[test]
    fn files_are_read_beneath_a_root_and_bounded() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        std::fs::write(root.path().join("etc/passwd"), "me:x:5:6::/me:/bin/me\n").unwrap();
        let accounts = Accounts::read(root.path());
        assert_eq!(accounts.resolve("me").unwrap().gid, 6);
        let huge = std::fs::File::create(root.path().join("etc/passwd")).unwrap();
        huge.set_len(MAX_FILE_BYTES + 1).unwrap();
        assert_eq!(Accounts::read(root.path()), Accounts::default());
    }

    proptest! {
        #[test]
        fn hostile_files_never_panic(passwd in proptest::collection::vec(any::<u8>(), 0..400),
                                     group in proptest::collection::vec(any::<u8>(), 0..400), spec in "\\PC{0,20}") {
            let _ = Accounts::new(passwd, group).resolve(&spec);
        }

        #[test]
        fn a_written_user_is_found(name in "[a-z_][a-z0-9_-]{0,15}", uid in any::<u32>(), gid in any::<u32>(),
                                   junk in proptest::collection::vec("[^:\n]{0,10}(:[^:\n]{0,3}){0,2}", 0..5)) {
            let mut text = junk.join("\n");
            text.push_str(&format!("\n{name}:x:{uid}:{gid}:c:/h:/s\n"));
            let found = Accounts::new(text.into_bytes(), Vec::new()).resolve(&name).unwrap();
            prop_assert_eq!((found.uid, found.gid, found.groups), (uid, gid, vec![gid]));
        }
    }
}
