use dev_box_exec::Provisioner;
use dev_box_provision::sweep::{Orphans, find};
use dev_box_provision::vm_dir::VmDir;

use crate::bench::{Bench, Guest, request, this_user};

#[tokio::test]
async fn the_living_are_left_alone_and_the_dead_go() {
    let bench = Bench::new(Guest::Obeys).await;
    let living = bench.provisioner.provision(&request()).await.unwrap();
    let dead = "dev-box-dead".parse().unwrap();
    drop(VmDir::create(&bench.root.path().join("vms"), &dead, this_user()).unwrap());
    assert_eq!(find(bench.root.path()).unwrap(), std::slice::from_ref(&dead));

    let swept = bench.sweep(Orphans::Go).await;
    assert_eq!(swept.len(), 1);
    assert_eq!((&swept[0].name, &swept[0].error), (&dead, &None));
    assert_eq!(bench.vm_dirs(), [living.name.to_string()]);
    assert_eq!(bench.audit.actions(), ["vm.destroy:intent", "vm.destroy:ok"]);
    // A log that is full keeps nothing alive.
    drop(VmDir::create(&bench.root.path().join("vms"), &dead, this_user()).unwrap());
    bench.audit.fail_after(0);
    assert_eq!(bench.sweep(Orphans::Go).await.len(), 1);
    assert!(bench.sweep(Orphans::Go).await.is_empty());
    bench.provisioner.retire(living).await.unwrap();
    bench.assert_clean();
}

#[tokio::test]
async fn what_is_not_a_vms_is_not_touched() {
    let bench = Bench::new(Guest::Obeys).await;
    let vms = bench.root.path().join("vms");
    std::fs::create_dir_all(vms.join("No VM's Name")).unwrap();
    std::fs::write(vms.join("README"), "mine").unwrap();
    let swept = bench.sweep(Orphans::Go).await;
    assert!(
        swept.iter().all(|left| left.error.is_some()),
        "a file by a VM's name cannot be swept: {swept:?}"
    );
    assert!(vms.join("No VM's Name").is_dir() && vms.join("README").is_file());
}

#[tokio::test]
async fn no_vms_nothing_to_sweep() {
    let bench = Bench::new(Guest::Obeys).await;
    assert!(bench.sweep(Orphans::Go).await.is_empty());
    assert!(find(bench.root.path()).unwrap().is_empty());
}
