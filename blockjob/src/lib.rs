//! The block jobs of libvirt's C interface (libvirt-domain.h) that the crate `virt` does not bind. The only `unsafe` code of
//! the project: three calls with C strings and one plain structure.

use std::ffi::{CStr, c_int, c_uint};

use virt::domain::Domain;
use virt::error::Error;
use virt_sys as sys;

/// How far a disk's block job is, in libvirt's own units.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Done.
    pub current: u64,
    /// In all; it grows while the guest writes.
    pub end: u64,
    /// Whether the job commits the active image; else it is another one.
    pub commits_active: bool,
}

/// Begins to commit a disk's active overlay into the image right under it (`virDomainBlockCommit`, active and shallow). The
/// overlay is named: were it no longer in use, "the active one" would be the guest's own image, and its template the one under it.
pub fn commit_active(domain: &Domain, disk: &CStr, overlay: &CStr) -> Result<(), Error> {
    let flags = sys::VIR_DOMAIN_BLOCK_COMMIT_ACTIVE | sys::VIR_DOMAIN_BLOCK_COMMIT_SHALLOW;
    // SAFETY: the domain is referenced for as long as it is borrowed, the strings end with a zero, and libvirt takes null for
    // "the image under it".
    let done = unsafe {
        sys::virDomainBlockCommit(
            domain.as_ptr(),
            disk.as_ptr(),
            std::ptr::null(),
            overlay.as_ptr(),
            0,
            flags,
        )
    };
    checked(done).map(drop)
}

/// Ends a commit that is ready: the image under the overlay is the disk's again (`virDomainBlockJobAbort`, pivot).
pub fn pivot(domain: &Domain, disk: &CStr) -> Result<(), Error> {
    // SAFETY: as above.
    let done = unsafe {
        sys::virDomainBlockJobAbort(
            domain.as_ptr(),
            disk.as_ptr(),
            sys::VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT,
        )
    };
    checked(done).map(drop)
}

/// The disk's block job, if there is one (`virDomainGetBlockJobInfo`).
pub fn progress(domain: &Domain, disk: &CStr) -> Result<Option<Progress>, Error> {
    let mut info = sys::virDomainBlockJobInfo {
        type_: 0,
        bandwidth: 0,
        cur: 0,
        end: 0,
    };
    // SAFETY: as above, and the structure is libvirt's own for this call.
    let found =
        unsafe { sys::virDomainGetBlockJobInfo(domain.as_ptr(), disk.as_ptr(), &raw mut info, 0) };
    Ok((checked(found)? > 0).then_some(Progress {
        current: info.cur,
        end: info.end,
        commits_active: c_uint::try_from(info.type_)
            == Ok(sys::VIR_DOMAIN_BLOCK_JOB_TYPE_ACTIVE_COMMIT),
    }))
}

fn checked(answer: c_int) -> Result<c_int, Error> {
    if answer < 0 {
        return Err(Error::last_error());
    }
    Ok(answer)
}
