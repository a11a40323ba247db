use dev_box_comm::message::{GuestErrorKind, WriteMode};
use dev_box_comm::session::{GuestStreamParts, Incoming};
use dev_box_comm::{GuestHello, HostHello};
use tokio::io::duplex;

use super::*;

/// A host's session, and a guest that does as `serve` says with its one stream.
pub(crate) async fn guest<F>(serve: impl FnOnce(Request, GuestStreamParts) -> F + Send + 'static) -> Session
where
    F: Future<Output = ()> + Send,
{
    let (ours, theirs) = duplex(64 << 10);
    let (host, guest) = tokio::join!(
        Session::connect(ours, HostHello::fresh().unwrap()),
        Session::accept(theirs, GuestHello::new("b"))
    );
    let (guest, mut incoming, _): (Session, Incoming, _) = guest.unwrap();
    tokio::spawn(async move {
        let (request, stream) = incoming.next().await.unwrap();
        serve(request, stream.split()).await;
        // The session ends with its last handle.
        guest.closed().await;
    });
    host.unwrap().0
}

fn write_file() -> WriteFile {
    WriteFile {
        path: "/f".into(),
        mode: None,
        how: WriteMode::Replace,
        parents: false,
        owner: None,
        sync: false,
    }
}

fn refusal() -> Message {
    Message::Failed(GuestError::new(GuestErrorKind::NoSpace, "full"))
}

#[tokio::test]
async fn a_file_goes_in_whole() {
    let session = guest(|request, mut parts| async move {
        assert_eq!(request, Request::WriteFile(write_file()));
        let mut got = 0;
        while let Some(bytes) = parts.input.next().await {
            got += bytes.len();
        }
        assert_eq!((got, parts.input.end()), (3 << 20, Some(LaneEnd::Finished)));
        parts.sender.send(Message::Done).await.unwrap();
    })
    .await;
    let content = vec![7; 3 << 20];
    assert_eq!(put_file(&session, write_file(), &mut &*content).await.unwrap(), 3 << 20);
}

#[tokio::test]
async fn a_guest_that_takes_no_more_says_why() {
    let session = guest(|_, mut parts| async move {
        parts.input.next().await;
        parts.sender.send(refusal()).await.unwrap();
    })
    .await;
    let error = put_file(&session, write_file(), &mut tokio::io::repeat(1)).await.unwrap_err();
    assert!(matches!(&error, TransferError::Guest(why) if why.kind == GuestErrorKind::NoSpace), "{error}");
}

#[tokio::test]
async fn a_file_comes_out_and_has_a_limit() {
    let send = |_, mut parts: GuestStreamParts| async move {
        let _ = parts.output.write(Bytes::from(vec![1; 200_000])).await;
        parts.output.finish();
        let _ = parts.sender.send(Message::Done).await;
    };
    let mut out = Vec::new();
    assert_eq!(get_file(&guest(send).await, Path::new("/f"), 1 << 20, &mut out).await.unwrap(), 200_000);
    assert_eq!(out, vec![1; 200_000]);
    let error = get_file(&guest(send).await, Path::new("/f"), 1000, &mut out).await.unwrap_err();
    assert!(matches!(error, TransferError::TooLarge(1000)), "{error}");
}

#[tokio::test]
async fn a_file_that_breaks_off_is_no_file() {
    let session = guest(|_, mut parts| async move {
        parts.output.write(Bytes::from_static(b"half")).await.unwrap();
        parts.sender.send(Message::Done).await.unwrap();
    })
    .await;
    let error = get_file(&session, Path::new("/f"), 1000, &mut Vec::new()).await.unwrap_err();
    assert!(matches!(error, TransferError::Violation(_)), "{error}");
    let session = guest(|_, parts| async move { drop(parts) }).await;
    let error = get_file(&session, Path::new("/f"), 1000, &mut Vec::new()).await.unwrap_err();
    assert!(matches!(error, TransferError::Stream(StreamError::Reset)), "{error}");
}

#[tokio::test]
async fn a_tree_goes_there_and_back() {
    let dir = tempfile::tempdir().unwrap();
    let from = dir.path().join("from");
    std::fs::create_dir_all(from.join("sub")).unwrap();
    std::fs::write(from.join("sub/file"), vec![9; 2 << 20]).unwrap();
    let (kept, archive) = tokio::sync::oneshot::channel();
    let session = guest(|request, mut parts| async move {
        assert!(matches!(request, Request::Unpack(_)));
        let mut bytes = Vec::new();
        while let Some(chunk) = parts.input.next().await {
            bytes.extend_from_slice(&chunk);
        }
        parts.sender.send(Message::Done).await.unwrap();
        kept.send(bytes).unwrap();
    })
    .await;
    let packed = put_tree(&session, from, Path::new("/t"), None, Limits::default()).await.unwrap();
    assert_eq!(packed, Packed { entries: 2, bytes: 2 << 20, ..Packed::default() });
    let bytes = Bytes::from(archive.await.unwrap());
    let session = guest(|request, mut parts| async move {
        assert!(matches!(request, Request::Pack(_)));
        parts.output.write(bytes).await.unwrap();
        parts.output.finish();
        parts.sender.send(Message::Done).await.unwrap();
    })
    .await;
    let to = dir.path().join("to");
    let unpacked = get_tree(&session, Path::new("/t"), to.clone(), None, Limits::default()).await.unwrap();
    assert_eq!((unpacked.files, unpacked.directories), (1, 1));
    assert_eq!(std::fs::read(to.join("sub/file")).unwrap(), vec![9; 2 << 20]);
}

#[tokio::test]
async fn trees_that_fail_say_why() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("f"), vec![9; 4 << 20]).unwrap();
    let session = guest(|_, mut parts| async move {
        parts.input.next().await;
        parts.sender.send(refusal()).await.unwrap();
    })
    .await;
    let error =
        put_tree(&session, dir.path().into(), Path::new("/t"), None, Limits::default()).await.unwrap_err();
    assert!(matches!(error, TransferError::Guest(_)), "{error}");
    let session = guest(|_, mut parts| async move {
        // All of it: the stream is reset with its sender and receiver.
        let parts = &mut parts;
        parts.output.write(Bytes::from_static(&[1; 700])).await.unwrap();
        std::future::pending::<()>().await;
    })
    .await;
    let to = dir.path().join("to");
    let error = get_tree(&session, Path::new("/t"), to.clone(), None, Limits::default()).await.unwrap_err();
    assert!(matches!(error, TransferError::Archive(ArchiveError::Malformed(_))), "{error}");
    let session = guest(|_, mut parts| async move {
        parts.sender.send(Message::Failed(GuestError::new(GuestErrorKind::NotFound, "no"))).await.unwrap();
    })
    .await;
    let error = get_tree(&session, Path::new("/t"), to, None, Limits::default()).await.unwrap_err();
    assert!(matches!(&error, TransferError::Guest(why) if why.kind == GuestErrorKind::NotFound), "{error}");
}
