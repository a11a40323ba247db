//! A [`Resolver`] in memory: serves what it was told to, until something ends it.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{NameService, NamesDigest, Resolver, ResolverError};

/// The fake.
#[derive(Debug, Default)]
pub struct FakeResolver {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    served: BTreeMap<Ipv4Addr, NameService>,
    refuse: bool,
}

impl FakeResolver {
    /// One that serves nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is served for an address.
    pub fn served(&self, address: Ipv4Addr) -> Option<NameService> {
        self.state().served.get(&address).cloned()
    }

    /// Ends a resolver as its crash would.
    pub fn crash(&self, address: Ipv4Addr) {
        self.state().served.remove(&address);
    }

    /// Makes the next [`Resolver::serve`] fail.
    pub fn refuse_next(&self) {
        self.state().refuse = true;
    }
}

impl Resolver for FakeResolver {
    fn serve(&self, names: &NameService) -> Result<(), ResolverError> {
        let mut state = self.state();
        state.served.remove(&names.address());
        if std::mem::take(&mut state.refuse) {
            return Err(ResolverError::Refused {
                vm: names.vm().clone(),
                message: "scripted fault".to_owned(),
            });
        }
        // Two daemons cannot listen on one port.
        let taken = state.served.values().find(|other| other.listens_on() == names.listens_on());
        if let Some(other) = taken {
            let message = format!("the port is taken by {}", other.vm());
            return Err(ResolverError::Refused { vm: names.vm().clone(), message });
        }
        state.served.insert(names.address(), names.clone());
        Ok(())
    }

    fn stop(&self, address: Ipv4Addr) -> Result<(), ResolverError> {
        self.state().served.remove(&address);
        Ok(())
    }

    fn serving(&self) -> Result<BTreeMap<Ipv4Addr, NamesDigest>, ResolverError> {
        Ok(self.state().served.iter().map(|(address, names)| (*address, names.digest())).collect())
    }
}
