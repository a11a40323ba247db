//! What every transport must do.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::transport::{Dial, Listen};

/// Checks a dialler and the listener it reaches: bytes in order both ways, sizes beyond any buffer, connections apart from
/// each other, an end that is seen.
///
/// # Panics
/// Where the contract is broken.
#[expect(clippy::expect_used, reason = "a contract's verdict is a panic, as a test's is")]
pub async fn dial_and_listen(dial: &dyn Dial, listen: &mut dyn Listen) {
    assert!(!dial.describe().is_empty(), "a dialler says where it dials");

    let (near, far) = tokio::join!(dial.dial(), listen.accept());
    let (mut near, mut far) = (near.expect("dial"), far.expect("accept"));

    near.write_all(b"to the guest").await.expect("write");
    near.flush().await.expect("flush");
    let mut got = [0; 12];
    far.read_exact(&mut got).await.expect("read");
    assert_eq!(&got, b"to the guest");

    let sent: Vec<u8> = (0..1_000_000u32).map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1]).collect();
    let mut got = vec![0; sent.len()];
    let (wrote, read) = tokio::join!(
        async {
            far.write_all(&sent).await?;
            far.flush().await
        },
        near.read_exact(&mut got)
    );
    wrote.expect("write");
    read.expect("read");
    assert!(got == sent, "a megabyte came through changed");

    let (second_near, second_far) = tokio::join!(dial.dial(), listen.accept());
    let (mut second_near, mut second_far) =
        (second_near.expect("dial again"), second_far.expect("accept again"));
    second_far.write_all(b"2").await.expect("write");
    second_far.flush().await.expect("flush");
    far.write_all(b"1").await.expect("write");
    far.flush().await.expect("flush");
    assert_eq!(near.read_u8().await.expect("read"), b'1', "the first connection got the second one's byte");
    assert_eq!(
        second_near.read_u8().await.expect("read"),
        b'2',
        "the second connection got the first one's byte"
    );

    drop(far);
    assert_eq!(
        near.read(&mut [0; 8]).await.expect("an end, not an error"),
        0,
        "the end of a connection is seen"
    );
    drop(second_near);
    assert_eq!(
        second_far.read(&mut [0; 8]).await.expect("an end, not an error"),
        0,
        "the end is seen the other way"
    );
}
