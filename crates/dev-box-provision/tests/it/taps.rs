//! Taps that are prepared for VMs to come, and used by one after the other.

use std::time::Duration;

use dev_box_core::libvirt::{Domains, LibvirtError, NwFilters, XmlView};
use dev_box_core::spec::{HostEnd, Interface};
use dev_box_core::template::VmTemplate;
use dev_box_exec::{Cancel, NetworkMode, ProvisionError, Provisioner};
use dev_box_net::EgressPolicy;
use dev_box_net::identity::{address_of_tap, mac_of};
use dev_box_net::xml::nwfilter::nwfilter;

use crate::bench::{Bench, Guest, request};
use crate::template::{create, migrations_end, new};

impl Bench {
    async fn keep_taps(&self, count: usize) {
        self.provisioner.keep_taps(&NetworkMode::NatFiltered, count).await.unwrap();
    }

    fn waiting(&self) -> usize {
        self.provisioner.waiting_taps(&NetworkMode::NatFiltered).unwrap()
    }

    async fn wait_for_taps(&self, count: usize) {
        while self.waiting() != count {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    fn bound(&self) -> Vec<String> {
        self.libvirt.bound_filters().unwrap()
    }

    /// As libvirt does where a filter is bound: it is seen in force.
    fn filters_are_in_force(&self) {
        let shape = self.network.ensure(&self.libvirt).unwrap();
        for tap in self.bound() {
            let address = address_of_tap(&tap).unwrap();
            let rules = nwfilter(&shape, &EgressPolicy::NatFiltered).in_force(mac_of(address), address);
            self.firewall.put_filter(address, rules);
        }
    }

    fn interface_of(&self, vm: &str) -> Interface {
        let domain = self.libvirt.find(vm).unwrap().unwrap();
        let xml = self.libvirt.xml(domain.id, XmlView::Current).unwrap();
        VmTemplate::from_xml(&xml).unwrap().into_spec().interface.unwrap()
    }

    fn assert_bare(&self) {
        self.assert_clean();
        assert_eq!(self.bound(), Vec::<String>::new());
        let interfaces = std::fs::read_dir(self.root.path().join("interfaces"));
        assert_eq!(interfaces.into_iter().flatten().count(), 0, "taps are left");
    }
}

#[tokio::test]
async fn one_that_could_not_be_made_is_tried_again() {
    let bench = Bench::new(Guest::Obeys).await;
    bench.libvirt.fail_next("bind_filter", LibvirtError::InvalidXml { message: "scripted".to_owned() });
    bench.keep_taps(1).await;
    tokio::time::timeout(Duration::from_secs(60), bench.wait_for_taps(1)).await.unwrap();
    bench.provisioner.drain().await;
    bench.assert_bare();
}

#[tokio::test]
async fn one_vm_after_the_other_has_it() {
    let bench = Bench::new(Guest::Obeys).await;
    bench.keep_taps(1).await;
    bench.wait_for_taps(1).await;
    bench.filters_are_in_force();
    let tap = bench.bound().pop().unwrap();
    bench.assert_clean();

    for _ in 0..3 {
        let vm = bench.provisioner.provision(&request()).await.unwrap();
        let interface = bench.interface_of(vm.name.as_str());
        assert_eq!((interface.host_end, interface.target_dev.as_ref()), (HostEnd::Prepared, Some(&tap)));
        assert_eq!((bench.waiting(), bench.bound()), (0, vec![tap.clone()]), "no other is made beside it");
        // It is the only one: the next VM's is libvirt's.
        let other = bench.provisioner.provision(&request()).await.unwrap();
        assert_eq!(bench.interface_of(other.name.as_str()).host_end, HostEnd::Libvirt);
        bench.provisioner.retire(other).await.unwrap();
        assert_eq!(bench.waiting(), 0);
        bench.provisioner.retire(vm).await.unwrap();
        assert_eq!(bench.waiting(), 1);
        bench.assert_clean();
    }
    bench.provisioner.drain().await;
    bench.assert_bare();
}

#[tokio::test]
async fn a_shell_that_nobody_wants_gives_it_back() {
    let bench = Bench::new(Guest::Obeys).await;
    migrations_end(&bench, "completed");
    create(&bench, new("t"), Cancel::never()).await.unwrap();
    bench.keep_taps(1).await;
    bench.wait_for_taps(1).await;
    bench.filters_are_in_force();
    let tap = bench.bound();
    bench.provisioner.keep_shells(&request(), 1).await;
    while bench.provisioner.shells(&request()) != 1 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!((bench.waiting(), bench.bound()), (0, tap.clone()), "the shell has it");
    bench.libvirt.fail_next("bind_filter", LibvirtError::Unsupported { message: "scripted".to_owned() });
    bench.provisioner.keep_shells(&request(), 0).await;
    assert_eq!((bench.waiting(), bench.bound()), (1, tap), "it was not made anew");
    bench.provisioner.drain().await;
    bench.assert_bare();
}

#[tokio::test]
async fn as_many_as_are_wanted() {
    let bench = Bench::new(Guest::Obeys).await;
    bench.keep_taps(3).await;
    bench.wait_for_taps(3).await;
    bench.filters_are_in_force();
    let vm = bench.provisioner.provision(&request()).await.unwrap();
    bench.keep_taps(1).await;
    assert_eq!((bench.waiting(), bench.bound().len()), (0, 1), "the VM has the one that is left");
    bench.provisioner.retire(vm).await.unwrap();
    assert_eq!(bench.waiting(), 1);
    bench.keep_taps(0).await;
    bench.assert_bare();
    bench.provisioner.keep_taps(&NetworkMode::Isolated, 1).await.unwrap();
    assert!(bench.provisioner.keep_taps(&NetworkMode::Named("nope".into()), 1).await.is_err());
}

#[tokio::test]
async fn one_whose_filter_is_gone_serves_nobody_and_is_replaced() {
    let bench = Bench::new(Guest::Obeys).await;
    bench.keep_taps(1).await;
    bench.wait_for_taps(1).await;
    let broken = bench.bound();
    let error = bench.provisioner.provision(&request()).await.unwrap_err();
    assert!(matches!(&error, ProvisionError::Step { step, .. } if step.contains("verifying")), "{error:?}");
    bench.wait_for_taps(1).await;
    bench.filters_are_in_force();
    let vm = bench.provisioner.provision(&request()).await.unwrap();
    assert_eq!(bench.interface_of(vm.name.as_str()).host_end, HostEnd::Prepared);
    // What was found wrong only after it had been used goes as well.
    bench.firewall.flush_filters();
    bench.provisioner.retire(vm).await.unwrap();
    bench.wait_for_taps(1).await;
    bench.provisioner.drain().await;
    bench.assert_bare();
    assert_eq!(broken.len(), 1);
}

#[tokio::test]
async fn without_one_a_vm_takes_longer_and_that_is_all() {
    let bench = Bench::new(Guest::Obeys).await;
    let refusal = || LibvirtError::Unsupported { message: "scripted".to_owned() };
    bench.libvirt.fail_next("bind_filter", refusal());
    bench.keep_taps(1).await;
    let vm = bench.provisioner.provision(&request()).await.unwrap();
    assert_eq!(bench.interface_of(vm.name.as_str()).host_end, HostEnd::Libvirt);
    // The next attempt is made beside the next VM.
    bench.wait_for_taps(1).await;
    bench.provisioner.retire(vm).await.unwrap();
    assert_eq!(bench.waiting(), 1);
    bench.keep_taps(0).await;
    bench.assert_bare();
}

#[tokio::test]
async fn the_next_owner_removes_what_a_dead_one_left() {
    let mut bench = Bench::new(Guest::Obeys).await;
    bench.keep_taps(2).await;
    bench.wait_for_taps(2).await;
    bench.filters_are_in_force();
    let vm = bench.provisioner.provision(&request()).await.unwrap();
    bench.sweep(dev_box_provision::sweep::Orphans::Go).await;
    assert_eq!(bench.bound().len(), 2, "their owner lives");
    bench.succeed();
    // Its last handle: the locks go.
    drop(vm);
    while !bench.bound().is_empty() {
        bench.sweep(dev_box_provision::sweep::Orphans::Go).await;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    bench.assert_bare();
}
