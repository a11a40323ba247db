//! Bindings of filters to interfaces, which `virt` does not offer.
//!
//! Of each pointer that libvirt hands out a [`Binding`] is made at once, which gives the reference back when it is dropped.

use std::ffi::{CStr, CString, c_char};
use std::ptr;

use virt::connect::Connect;
use virt_sys as sys;

use super::of;
use crate::libvirt::{LibvirtError, Result};

/// A reference to a binding; never null.
struct Binding(sys::virNWFilterBindingPtr);

impl Binding {
    fn new(raw: sys::virNWFilterBindingPtr) -> Result<Self> {
        if raw.is_null() { Err(of(virt::error::Error::last_error())) } else { Ok(Self(raw)) }
    }

    #[expect(unsafe_code, reason = "virt has no bindings of filters")]
    fn interface(&self) -> Option<String> {
        // SAFETY: the pointer is valid while `self` lives, and so is the text that it gives, which ends with a NUL.
        let name: *const c_char = unsafe { sys::virNWFilterBindingGetPortDev(self.0) };
        // SAFETY: as above.
        (!name.is_null()).then(|| unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned())
    }
}

impl Drop for Binding {
    #[expect(unsafe_code, reason = "virt has no bindings of filters")]
    fn drop(&mut self) {
        // SAFETY: the reference is ours, and given back this once.
        unsafe { sys::virNWFilterBindingFree(self.0) };
    }
}

#[expect(unsafe_code, reason = "virt has no bindings of filters")]
pub(super) fn list(connect: &Connect) -> Result<Vec<String>> {
    let mut found: *mut sys::virNWFilterBindingPtr = ptr::null_mut();
    // SAFETY: the connection lives for the call; `found` is where libvirt puts an array of its making.
    let count = unsafe { sys::virConnectListAllNWFilterBindings(connect.as_ptr(), &raw mut found, 0) };
    let count = usize::try_from(count).map_err(|_| of(virt::error::Error::last_error()))?;
    // SAFETY: the array has so many elements, each a reference that is ours, and is freed once, after they were read.
    let bindings: Vec<_> = (0..count).map(|index| Binding::new(unsafe { *found.add(index) })).collect();
    // SAFETY: libvirt allocates the array with malloc(3), and says that the caller is to free it.
    unsafe { libc::free(found.cast()) };
    Ok(bindings.into_iter().flatten().filter_map(|binding| binding.interface()).collect())
}

#[expect(unsafe_code, reason = "virt has no bindings of filters")]
pub(super) fn create(connect: &Connect, xml: &str) -> Result<()> {
    let xml = text(xml)?;
    // SAFETY: the connection and the text live for the call.
    Binding::new(unsafe { sys::virNWFilterBindingCreateXML(connect.as_ptr(), xml.as_ptr(), 0) }).map(drop)
}

#[expect(unsafe_code, reason = "virt has no bindings of filters")]
pub(super) fn delete(connect: &Connect, interface: &str) -> Result<()> {
    let interface = text(interface)?;
    // SAFETY: the connection and the text live for the call.
    let found = unsafe { sys::virNWFilterBindingLookupByPortDev(connect.as_ptr(), interface.as_ptr()) };
    let binding = Binding::new(found)?;
    // SAFETY: the pointer is valid while `binding` lives.
    match unsafe { sys::virNWFilterBindingDelete(binding.0) } {
        0 => Ok(()),
        _ => Err(of(virt::error::Error::last_error())),
    }
}

fn text(text: &str) -> Result<CString> {
    CString::new(text).map_err(|error| LibvirtError::InvalidXml { message: error.to_string() })
}
