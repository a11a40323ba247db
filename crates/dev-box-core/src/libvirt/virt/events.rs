//! libvirt's event loop, lifecycle events and the close callback, which `virt` does not offer.
//!
//! Life of a callback's data: a boxed [`EventSink`] goes to libvirt as a raw pointer together with [`free_sink`].
//! Libvirt calls [`free_sink`] once, when the callback is deregistered and no longer under way; when registering
//! fails it does not, and the box is taken back here.

use std::ffi::{CStr, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::OnceLock;
use std::thread;
use std::time::Duration;

use uuid::Uuid;
use virt::connect::Connect;
use virt_sys as sys;

use super::of;
use crate::id::VmId;
use crate::libvirt::{
    CloseReason, DomainEvent, DomainEventKind, DriverEvent, EventSink, LibvirtError, Result,
};

/// Starts libvirt's event loop, once for the process, on a thread of its own.
pub(super) fn start_loop() -> Result<()> {
    static STARTED: OnceLock<std::result::Result<(), LibvirtError>> = OnceLock::new();
    STARTED
        .get_or_init(|| {
            // Libvirt would print every error to standard error besides returning it.
            virt::error::clear_error_callback();
            virt::event::event_register_default_impl().map_err(of)?;
            let run = || {
                loop {
                    if virt::event::event_run_default_impl().is_err() {
                        // poll(2) failed: nothing helps but trying again, not at full speed.
                        thread::sleep(Duration::from_millis(100));
                    }
                }
            };
            thread::Builder::new().name("libvirt-events".into()).spawn(run).map_err(|error| {
                LibvirtError::OperationFailed { code: 0, message: format!("no thread for events: {error}") }
            })?;
            Ok(())
        })
        .clone()
}

/// Events of one connection, until it is dropped.
#[derive(Debug)]
pub(super) struct Subscription {
    /// A reference of its own, so that the connection outlives the callbacks.
    connect: Connect,
    lifecycle: Option<c_int>,
    close: bool,
}

impl Subscription {
    /// Registers for lifecycle events and for the end of the connection. A driver that has no such events (or, with the
    /// second, no connection that could end) is no error: states are polled as well.
    #[expect(unsafe_code, reason = "virt has no registration of domain events")]
    pub(super) fn new(connect: &Connect, sink: EventSink) -> Result<Self> {
        let connect = connect.clone();
        let mut made = Self { connect, lifecycle: None, close: false };
        // SAFETY: the pointer is valid while `made.connect` lives, which holds a reference.
        let raw = unsafe { made.connect.as_ptr() };

        let data = Box::into_raw(Box::new(sink.clone())).cast::<c_void>();
        // SAFETY: libvirt calls back with the signature that belongs to the event id; for LIFECYCLE that is
        // `virConnectDomainEventCallback`, and casting it to the generic type is the documented way (a cast in C).
        let callback = unsafe {
            std::mem::transmute::<sys::virConnectDomainEventCallback, sys::virConnectDomainEventGenericCallback>(
                Some(on_lifecycle),
            )
        };
        // SAFETY: `raw` is valid; a null domain means all domains; `data` is what `on_lifecycle` and `free_sink` expect.
        let registered = unsafe {
            sys::virConnectDomainEventRegisterAny(
                raw,
                ptr::null_mut(),
                sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE as c_int,
                callback,
                data,
                Some(free_sink),
            )
        };
        if registered >= 0 {
            made.lifecycle = Some(registered);
        } else {
            let error = of(virt::error::Error::last_error());
            // SAFETY: registering failed, so libvirt does not own `data`.
            unsafe { free_sink(data) };
            if !matches!(error, LibvirtError::Unsupported { .. }) {
                return Err(error);
            }
        }

        let data = Box::into_raw(Box::new(sink)).cast::<c_void>();
        // SAFETY: as above, with the callback that this function is declared with.
        let registered =
            unsafe { sys::virConnectRegisterCloseCallback(raw, Some(on_close), data, Some(free_sink)) };
        if registered >= 0 {
            made.close = true;
        } else {
            // SAFETY: registering failed, so libvirt does not own `data`.
            unsafe { free_sink(data) };
        }
        Ok(made)
    }
}

impl Drop for Subscription {
    #[expect(unsafe_code, reason = "virt has no registration of domain events")]
    fn drop(&mut self) {
        // SAFETY: the pointer is valid while `self.connect` lives. Deregistering fails on a dead connection, where
        // libvirt has dropped the callbacks already, or drops them with the connection.
        unsafe {
            let raw = self.connect.as_ptr();
            if let Some(id) = self.lifecycle {
                sys::virConnectDomainEventDeregisterAny(raw, id);
            }
            if self.close {
                sys::virConnectUnregisterCloseCallback(raw, Some(on_close));
            }
        }
    }
}

#[expect(unsafe_code, reason = "called by libvirt")]
unsafe extern "C" fn free_sink(data: *mut c_void) {
    // SAFETY: `data` came from `Box::into_raw` of a `Box<EventSink>`, and this is the only place that takes it back.
    drop(unsafe { Box::from_raw(data.cast::<EventSink>()) });
}

#[expect(unsafe_code, reason = "called by libvirt")]
unsafe extern "C" fn on_lifecycle(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    event: c_int,
    detail: c_int,
    data: *mut c_void,
) -> c_int {
    let Some(kind) = DomainEventKind::from_libvirt(event) else { return 0 };
    let mut uuid = [0u8; 16];
    // SAFETY: libvirt's domain is valid during the callback, a raw UUID has 16 bytes (VIR_UUID_BUFLEN), and the name is
    // a C string that belongs to the domain. Neither asks the daemon.
    let name = unsafe {
        if sys::virDomainGetUUID(domain, uuid.as_mut_ptr()) < 0 {
            return 0;
        }
        let name = sys::virDomainGetName(domain);
        if name.is_null() { String::new() } else { CStr::from_ptr(name).to_string_lossy().into_owned() }
    };
    let id = VmId::from(Uuid::from_bytes(uuid));
    // SAFETY: `data` is the box that was registered, alive until `free_sink`.
    unsafe { deliver(data, DriverEvent::Domain(DomainEvent { id, name, kind, detail })) };
    // Libvirt asks for a number and looks at none.
    0
}

#[expect(unsafe_code, reason = "called by libvirt")]
unsafe extern "C" fn on_close(_: sys::virConnectPtr, reason: c_int, data: *mut c_void) {
    // SAFETY: `data` is the box that was registered, alive until `free_sink`.
    unsafe { deliver(data, DriverEvent::Closed(CloseReason::from_libvirt(reason))) };
}

/// # Safety
/// `data` must be a `Box<EventSink>`'s pointer, alive.
#[expect(unsafe_code, reason = "takes a pointer back from libvirt")]
unsafe fn deliver(data: *mut c_void, event: DriverEvent) {
    // SAFETY: by this function's contract.
    let sink = unsafe { &*data.cast::<EventSink>() };
    // A panic must not cross into C.
    if catch_unwind(AssertUnwindSafe(|| sink(event))).is_err() {
        tracing::error!("a subscriber to libvirt's events panicked");
    }
}
