use dev_box_comm::message::{ChangeKind, FileKind, GuestError, GuestErrorKind};
use dev_box_comm::session::GuestStreamParts;

use super::*;
use crate::transfer::tests::guest;

fn a_file(size: u64) -> FileStat {
    FileStat { kind: FileKind::File, size, mode: 0o644, uid: 0, gid: 0, modified_ns: 0, link: None }
}

fn entry(name: &str) -> DirEntry {
    DirEntry { name: name.into(), stat: a_file(3) }
}

/// A session whose guest answers so to one request.
async fn answering(messages: Vec<Message>) -> Session {
    guest(|_, mut parts: GuestStreamParts| async move {
        for message in messages {
            parts.sender.send(message).await.unwrap();
        }
        // Until the host has read it all.
        while parts.receiver.recv().await.is_ok_and(|message| message.is_some()) {}
    })
    .await
}

fn refusal() -> Message {
    Message::Failed(GuestError::new(GuestErrorKind::NotFound, "no"))
}

fn is_refused<T: std::fmt::Debug>(outcome: Result<T, TransferError>) -> bool {
    matches!(outcome, Err(TransferError::Guest(error)) if error.kind == GuestErrorKind::NotFound)
}

fn is_violation<T>(outcome: &Result<T, TransferError>) -> bool {
    matches!(outcome, Err(TransferError::Violation(_)))
}

#[tokio::test]
async fn what_is_there_is_asked() {
    let path = Path::new("/f");
    let session = answering(vec![Message::Stat(a_file(3)), Message::Done]).await;
    assert_eq!(stat(&session, path).await.unwrap(), a_file(3));
    assert!(is_violation(&stat(&answering(vec![Message::Done]).await, path).await));
    assert!(is_refused(stat(&answering(vec![refusal()]).await, path).await));
}

#[tokio::test]
async fn a_directory_is_listed_whole_or_not_at_all() {
    let path = Path::new("/d");
    let parts = |names: [&str; 2]| Message::Entries { entries: names.map(entry).to_vec() };
    let session = answering(vec![parts(["a", "b"]), parts(["c", "d"]), Message::Done]).await;
    let names: Vec<_> = list(&session, path).await.unwrap().into_iter().map(|entry| entry.name).collect();
    assert_eq!(names, ["a", "b", "c", "d"].map(WireBytes::from));
    assert!(is_refused(list(&answering(vec![parts(["a", "b"]), refusal()]).await, path).await));
    let odd = answering(vec![parts(["a", "b"]), Message::Stat(a_file(0)), Message::Done]).await;
    assert!(is_violation(&list(&odd, path).await));
}

#[tokio::test]
async fn a_list_without_end_is_given_up() {
    let session = guest(|_, mut parts| async move {
        let entries = vec![entry(&"x".repeat(60_000))];
        while parts.sender.send(Message::Entries { entries: entries.clone() }).await.is_ok() {}
    })
    .await;
    let error = list(&session, Path::new("/d")).await.unwrap_err();
    assert!(matches!(error, TransferError::TooLong(MAX_LIST_BYTES)), "{error}");
}

#[tokio::test]
async fn what_is_changed_is_asked_for_as_it_is_meant() {
    let make = MakeDir { path: "/d".into(), mode: Some(0o700), parents: true, owner: None };
    let rename_it = Rename { from: "/d".into(), to: "/e".into(), replace: false };
    let remove_it = Remove { path: "/e".into(), recursive: true, missing_ok: false };
    let wanted = |wanted: Request| {
        guest(|request, mut parts| async move {
            let answer = if request == wanted { Message::Done } else { refusal() };
            parts.sender.send(answer).await.unwrap();
        })
    };
    make_dir(&wanted(Request::MakeDir(make.clone())).await, make.clone()).await.unwrap();
    rename(&wanted(Request::Rename(rename_it.clone())).await, rename_it.clone()).await.unwrap();
    remove(&wanted(Request::Remove(remove_it.clone())).await, remove_it).await.unwrap();
    assert!(is_refused(make_dir(&wanted(Request::Rename(rename_it)).await, make).await));
}

#[tokio::test]
async fn changes_are_told_once_it_is_watched() {
    let change = |path: &str| Change { path: path.into(), kind: ChangeKind::Created };
    let told = |paths: &[&str]| Message::Changed { changes: paths.iter().copied().map(change).collect() };
    let request = Watch { path: "/d".into(), recursive: false };
    let session = answering(vec![told(&[]), told(&["a"]), told(&[]), told(&["b", "c"]), refusal()]).await;
    let mut changes = watch(&session, request.clone()).await.unwrap();
    assert_eq!(changes.next().await.unwrap(), [change("a")]);
    assert_eq!(changes.next().await.unwrap(), [change("b"), change("c")]);
    assert!(is_refused(changes.next().await));
    // An agent that does not say when it watches: its first change is not lost.
    let mut changes = watch(&answering(vec![told(&["a"])]).await, request.clone()).await.unwrap();
    assert_eq!(changes.next().await.unwrap(), [change("a")]);
    assert!(is_refused(watch(&answering(vec![refusal()]).await, request.clone()).await));
    assert!(is_violation(&watch(&answering(vec![Message::Done]).await, request).await));
}
