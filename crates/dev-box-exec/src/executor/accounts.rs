//! Who a user of the guest is: asked of the guest, since the image's accounts are its own.

use std::time::Duration;

use bytes::BytesMut;
use dev_box_comm::message::{GuestError, GuestErrorKind, Message, ReadFile, Request};
use dev_box_comm::session::Session;
use tokio::time::timeout;

use super::failure::Cause;
use crate::workspace::Owner;

/// How much of `/etc/passwd` is read.
const PASSWD_MAX: u64 = 256 << 10;

/// How long the guest may take to send it.
const PATIENCE: Duration = Duration::from_secs(30);

const WHAT: &str = "the guest could not say who the job's user is";

/// The user's and its primary group's numbers: of a name, or of a number (whose group is then the same number unless it
/// has an account). Guest-claimed: it decides about access inside the guest only.
pub(super) async fn resolve(session: &Session, user: &str) -> Result<Owner, Cause> {
    let passwd = timeout(PATIENCE, read(session)).await.unwrap_or(Err(Cause::Silent(PATIENCE)))?;
    lookup(&passwd, user).ok_or_else(|| {
        let text = format!("there is no user {user} in the image");
        Cause::Guest { what: WHAT, source: GuestError::new(GuestErrorKind::NotFound, text) }
    })
}

async fn read(session: &Session) -> Result<Vec<u8>, Cause> {
    let request = ReadFile { path: "/etc/passwd".into(), offset: 0, length: Some(PASSWD_MAX) };
    let mut stream = session.open(Request::ReadFile(request)).await?;
    let mut contents = BytesMut::new();
    while let Some(bytes) = stream.parts().output.next().await {
        if (contents.len() + bytes.len()) as u64 > PASSWD_MAX {
            return Err(Cause::Violation("it sent more of a file than was asked for"));
        }
        contents.extend_from_slice(&bytes);
    }
    match stream.recv().await? {
        Some(Message::Done) => Ok(contents.to_vec()),
        Some(Message::Failed(source)) => Err(Cause::guest(WHAT, source)),
        _ => Err(Cause::Violation("it answered a request with something else")),
    }
}

/// passwd(5): `name:password:uid:gid:...`, one a line.
fn lookup(passwd: &[u8], user: &str) -> Option<Owner> {
    let number: Option<u32> = user.parse().ok();
    let text = String::from_utf8_lossy(passwd);
    let accounts = text.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        Some((name, Owner { uid, gid }))
    });
    let mut found =
        accounts.filter(|(name, owner)| *name == user || Some(owner.uid) == number).map(|(_, owner)| owner);
    found.next().or_else(|| number.map(|uid| Owner { uid, gid: uid }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accounts_are_found() {
        let passwd = b"root:x:0:0:root:/root:/bin/sh\n\nbad\nbad:x:y:z\ndev:x:1000:1001:\xff:/home/dev:/bin/sh\n+::::::\n";
        let owner = |uid, gid| Some(Owner { uid, gid });
        assert_eq!(lookup(passwd, "root"), owner(0, 0));
        assert_eq!(lookup(passwd, "dev"), owner(1000, 1001));
        assert_eq!(lookup(passwd, "1000"), owner(1000, 1001));
        assert_eq!(lookup(passwd, "1234"), owner(1234, 1234));
        for unknown in ["nobody", "", "bad", "-1", "4294967296"] {
            assert_eq!(lookup(passwd, unknown), None, "{unknown}");
        }
    }
}
