//! A clone that goes back to its template's moment in place.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::time::Duration;

use dev_box::core::clock::{Clock as _, SystemClock};
use dev_box::core::vm::Vm;
use dev_box::exec::{NetworkMode, ProvisionError, Provisioner};
use dev_box::provision::rewind::{self, QemuProcess, Ram};
use dev_box_tests::{Host, wait_until};
use uuid::Uuid;

use crate::in_process::{InProcess, TEMPLATE};
use crate::net::ASK_RESOLVER;

const PAGE: usize = 4096;

/// Files on disk and in memory, and a process that goes on.
const JOB: &str = "head -c 20000000 /dev/urandom > /root/mine; head -c 20000000 /dev/urandom > /dev/shm/mine; sync; \
                   (setsid sleep 1000 < /dev/null > /dev/null 2>&1 &); hostname of-the-job; echo done";
/// Every one fails where something of that is left.
const NOTHING_LEFT: &str = "test ! -e /root/mine; test ! -e /dev/shm/mine; ! pidof sleep; \
                            test \"$(cat /root/setup)\" = kept";
const WHO: &str = "cat /etc/machine-id /proc/sys/kernel/random/boot_id; head -c 10 /dev/urandom | od -An -tx1; \
                   hostname; cat /sys/class/net/eth0/address; ip -4 -o addr show eth0 | awk '{print $4}'; date +%s";

/// Where QEMU keeps each piece of memory, and how much of it there is: `NAME PSIZE OFFSET USED TOTAL HVA RO`.
async fn blocks(vm: &Vm) -> BTreeMap<String, (u64, usize)> {
    let command = r#"{"execute":"human-monitor-command","arguments":{"command-line":"info ramblock"}}"#;
    let reply: serde_json::Value = serde_json::from_str(&vm.monitor(command).await.unwrap()).unwrap();
    let table = reply["return"].as_str().unwrap().to_owned();
    let hex = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap();
    let blocks: BTreeMap<_, _> = table
        .lines()
        .skip(1)
        .map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let [.., used, _total, address, _ro] = fields[..] else { panic!("{line}") };
            (fields[0].to_owned(), (hex(address), usize::try_from(hex(used)).unwrap()))
        })
        .collect();
    assert!(blocks.len() > 3, "{table}");
    blocks
}

/// All of QEMU's memory for the guest but its main RAM: firmware, option ROMs, tables.
async fn other_memory(vm: &Vm, process: &QemuProcess) -> BTreeMap<String, Vec<u8>> {
    let memory = File::open(format!("/proc/{}/mem", process.pid())).unwrap();
    let mut all = BTreeMap::new();
    for (name, (address, length)) in blocks(vm).await {
        if name != "dev-box.ram" {
            let mut bytes = vec![0; length];
            memory.read_exact_at(&mut bytes, address).unwrap();
            all.insert(name, bytes);
        }
    }
    all
}

/// Every byte of the RAM is the template's, but for the generation id, which is this one.
fn assert_is_the_templates(ram: &Ram, template: &std::path::Path, generation: Uuid) {
    let wanted = fs::read(template).unwrap();
    let mut found = vec![0; wanted.len()];
    ram.read(0, &mut found).unwrap();
    let pages = || wanted.chunks(PAGE).zip(found.chunks(PAGE)).enumerate();
    let different: Vec<_> = pages().filter(|(_, (wanted, found))| wanted != found).collect();
    assert_eq!(different.len(), 1, "pages {:?}", different.iter().map(|(at, _)| at).collect::<Vec<_>>());
    let (wanted, found) = different[0].1;
    assert_eq!((&wanted[..40], &wanted[56..]), (&found[..40], &found[56..]));
    assert_eq!(found[40..56], generation.to_bytes_le());
}

#[tokio::test(flavor = "multi_thread")]
async fn before_a_rewound_guest_goes_on_all_its_memory_is_the_templates_and_then_nothing_of_the_job_is_left()
{
    let Some(host) = Host::new("before_a_rewound_guest_goes_on_all_its_memory_is_the_templates") else {
        return;
    };
    let with = InProcess::with_template(&host, NetworkMode::NatFiltered).await;
    let provisioner = with.clones();
    let template = provisioner.templates().unwrap().get(&TEMPLATE.parse().unwrap()).unwrap();
    let clone = with.clone().await;
    let vm = Vm::find(with.dev_box.connection(), clone.name.as_str()).await.unwrap();
    let domain = vm.id().as_uuid();
    let process = Arc::new(QemuProcess::find(domain).unwrap());
    let first = with.sh(&clone, WHO).await;

    // Hardly anything has happened: what firmware and ROMs are like at the template's moment.
    let generation = Uuid::new_v4();
    rewind::back(&vm, &process, &template, generation).await.unwrap();
    assert_is_the_templates(&process.ram(&template.ram()).unwrap(), &template.ram(), generation);
    let firmware = other_memory(&vm, &process).await;
    vm.resume().await.unwrap();
    let clone = provisioner.reset(clone).await.unwrap();
    with.sh(&clone, NOTHING_LEFT).await;

    // One that dirties most of the memory.
    let much = "mount -o remount,size=90% /dev/shm; head -c 150000000 /dev/urandom > /dev/shm/much";
    with.sh(&clone, much).await;
    let clone = provisioner.reset(clone).await.unwrap();
    with.sh(&clone, NOTHING_LEFT).await;

    // A job that fills and dirties much.
    fs::write(clone.share.join("in"), "x").unwrap();
    with.sh(&clone, JOB).await;
    let generation = Uuid::new_v4();
    let own = || process.ram(&template.ram()).unwrap().own_pages().unwrap().count() * PAGE as u64;
    assert!(own() > 40_000_000, "{}", own());
    rewind::back(&vm, &process, &template, generation).await.unwrap();
    assert!(own() < 4_000_000, "its memory is given back: {}", own());
    assert_is_the_templates(&process.ram(&template.ram()).unwrap(), &template.ram(), generation);
    assert_eq!(other_memory(&vm, &process).await, firmware, "not in the devices' state, and changed");
    vm.resume().await.unwrap();

    let name = clone.name.clone();
    let clone = provisioner.reset(clone).await.unwrap();
    assert_eq!(clone.name, name);
    assert_eq!(fs::read_dir(&clone.share).unwrap().count(), 0);
    with.sh(&clone, NOTHING_LEFT).await;
    let second = with.sh(&clone, WHO).await;
    let lines = |text: &str| text.lines().map(|line| line.trim().to_owned()).collect::<Vec<_>>();
    let (first, second) = (lines(&first), lines(&second));
    for (index, what) in ["machine id", "boot id", "randomness"].into_iter().enumerate() {
        assert_ne!(first[index], second[index], "{what}");
    }
    assert_eq!(first[3..6], second[3..6], "name and addresses are the domain's");
    let now = u64::try_from(SystemClock.now().unix_nanos() / 1_000_000_000).unwrap();
    let clock: u64 = second[6].parse().unwrap();
    assert!(clock.abs_diff(now) <= 5, "the clock is {clock}, and it is {now}");
    // The network carries: the resolver answers by itself.
    let answer = with.sh(&clone, &format!("python3 - <<'END'\n{ASK_RESOLVER}\nEND")).await;
    assert_eq!(answer, "answered abcd\n");

    // Nobody but who ended in order is rewound.
    clone.session.close();
    clone.session.closed().await;
    let error = provisioner.reset(clone).await.unwrap_err();
    assert!(matches!(&error, ProvisionError::NotReset { why } if why.contains("abnormally")), "{error}");
    assert_eq!(host.vms(), Vec::<String>::new(), "it is gone");
    with.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rewind_that_fails_half_way_leaves_no_vm() {
    let Some(host) = Host::new("a_rewind_that_fails_half_way_leaves_no_vm") else { return };
    let with = InProcess::with_template(&host, NetworkMode::Isolated).await;
    let provisioner = with.clones();

    // Its QEMU is killed while it is reset; again where a stall let it be as good as new before.
    let mut failed = false;
    for _ in 0..5 {
        let clone = with.clone().await;
        let vm = Vm::find(with.dev_box.connection(), clone.name.as_str()).await.unwrap();
        let pid = QemuProcess::find(vm.id().as_uuid()).unwrap().pid();
        let pid = nix::unistd::Pid::from_raw(pid.cast_signed());
        let resetting = tokio::spawn({
            let provisioner = provisioner.clone();
            async move { provisioner.reset(clone).await }
        });
        tokio::time::sleep(Duration::from_millis(5)).await;
        nix::sys::signal::kill(pid, nix::sys::signal::SIGKILL).unwrap();
        match resetting.await.unwrap() {
            Ok(clone) => provisioner.retire(clone).await.unwrap(),
            Err(_) => failed = true,
        }
        wait_until("the VM is gone", Duration::from_secs(60), || {
            host.vms().is_empty() && host.qemu_pids().is_empty()
        });
        if failed {
            break;
        }
    }
    assert!(failed, "it was always reset before");

    // A template that was written to is no template: neither to rewind to nor to clone.
    let clone = with.clone().await;
    let template = provisioner.templates().unwrap().get(&TEMPLATE.parse().unwrap()).unwrap();
    let ram = File::options().write(true).open(template.ram()).unwrap();
    ram.set_len(ram.metadata().unwrap().len()).unwrap();
    ram.write_all_at(b"x", 4096).unwrap();
    let error = provisioner.reset(clone).await.unwrap_err();
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(cause.contains("damaged"), "{cause}");
    assert!(provisioner.provision(&with.request).await.unwrap_err().to_string().contains("damaged"));
    with.close().await;
}
