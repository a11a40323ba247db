//! VMs whose owner is gone, and their next.

use dev_box_exec::{NetworkMode, Provisioner, VmRequest};
use dev_box_net::Firewall as _;
use dev_box_provision::kept::AdoptError;
use dev_box_provision::sweep::Orphans;
use serde_json::json;

use crate::bench::{Bench, Guest, request};

/// A VM that was kept, by an owner who is gone.
async fn orphaned(bench: &mut Bench, request: &VmRequest) -> dev_box_core::id::VmName {
    let vm = bench.provisioner.provision(request).await.unwrap();
    bench.provisioner.keep(&vm, json!({"mine": 7})).await.unwrap();
    assert!(bench.provisioner.orphans().unwrap().is_empty(), "its owner lives");
    assert!(matches!(bench.provisioner.adopt(&vm.name).await, Err(AdoptError::Dir(_))));
    bench.succeed();
    vm.name
}

#[tokio::test]
async fn a_kept_vm_is_its_next_owners_as_it_was() {
    let mut bench = Bench::new(Guest::Obeys).await;
    let name = orphaned(&mut bench, &request()).await;
    // As long as its tap is there its address is in use.
    let lease = bench.network.list(&bench.libvirt).unwrap().remove(0);
    bench.make_tap(&dev_box_net::identity::tap_of(lease.address));
    let rules = bench.firewall.list().unwrap();
    assert_eq!(bench.provisioner.orphans().unwrap(), std::slice::from_ref(&name));
    let stay = bench.sweep(Orphans::Stay).await;
    assert!(stay.is_empty(), "who only passes by leaves it: {stay:?}");
    let adopted = bench.provisioner.adopt(&name).await;
    let Ok(adopted) = adopted else { panic!("{:?}", adopted.err()) };
    assert_eq!((adopted.vm.name.clone(), adopted.note), (name, json!({"mine": 7})));
    assert_eq!(bench.firewall.list().unwrap(), rules);
    assert!(bench.provisioner.orphans().unwrap().is_empty());
    bench.provisioner.retire(adopted.vm).await.unwrap();
    bench.assert_clean();
}

#[tokio::test]
async fn what_cannot_be_had_as_it_was_is_removed() {
    type Harm = fn(&Bench, &dev_box_core::id::VmName);
    let harms: [(&str, Harm); 5] = [
        ("domain", |bench, name| assert!(bench.libvirt.guest_powers_off(name.as_str()))),
        ("record", |bench, name| {
            std::fs::write(bench.root.path().join("vms").join(name.as_str()).join("kept.json"), "{").unwrap();
        }),
        ("record", |bench, name| {
            let path = bench.root.path().join("vms").join(name.as_str()).join("kept.json");
            let text = std::fs::read_to_string(&path).unwrap().replace(name.as_str(), "dev-box-other");
            std::fs::write(&path, text).unwrap();
        }),
        ("record", |bench, name| {
            let path = bench.root.path().join("vms").join(name.as_str()).join("kept.json");
            std::fs::remove_file(&path).unwrap();
            std::os::unix::fs::symlink("/etc/hostname", path).unwrap();
        }),
        ("network", |bench, name| {
            let path = bench.root.path().join("vms").join(name.as_str()).join("kept.json");
            let mut record: serde_json::Value =
                serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
            record["facts"]["network"] = serde_json::Value::Null;
            std::fs::write(path, record.to_string()).unwrap();
        }),
    ];
    for (what, harm) in harms {
        let mut bench = Bench::new(Guest::Obeys).await;
        let name = orphaned(&mut bench, &request()).await;
        harm(&bench, &name);
        let error = bench.provisioner.adopt(&name).await.unwrap_err();
        assert!(error.to_string().contains(what), "{what}: {error}");
        bench.sweep(Orphans::Go).await;
        bench.assert_clean();
    }
}

#[tokio::test]
async fn without_a_record_it_goes_like_any_other() {
    let mut bench = Bench::new(Guest::Obeys).await;
    let isolated = VmRequest { network: NetworkMode::Isolated, ..request() };
    bench.provisioner.provision(&isolated).await.unwrap();
    bench.succeed();
    assert!(bench.provisioner.orphans().unwrap().is_empty());
    let swept = bench.sweep(Orphans::Stay).await;
    assert_eq!(swept.len(), 1);
    bench.assert_clean();
}
