//! Where a pinned link holds its program, as the kernel says of the link itself.
//!
//! The hook could be asked instead (`BPF_PROG_QUERY`), but it names programs by their ids, and of an id only
//! `CAP_SYS_ADMIN` learns more, which the agent's unit does not leave it. A link's own descriptor takes no capability.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
    ptr,
};

use nix::libc::{self, c_int};

/// Commands of `bpf(2)`, from linux/bpf.h.
const BPF_OBJ_GET: c_int = 7;
const BPF_OBJ_GET_INFO_BY_FD: c_int = 15;

/// Their attributes.
#[repr(C)]
struct Get {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

#[repr(C)]
struct GetInfo {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

/// The beginning of `struct bpf_link_info`, with the first field of what it holds of a link of TCX or of XDP.
#[derive(Default)]
#[repr(C)]
struct LinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    /// The rest is a union with pointers in it.
    padding: u32,
    ifindex: u32,
}

/// The index of the interface at which a pinned link of TCX or of XDP holds its program; `None` where somebody has
/// detached it, or the interface has gone.
///
/// # Errors
///
/// [`io::ErrorKind::NotFound`] where there is no pin; others where the kernel does not tell.
pub(super) fn interface_of(pin: &Path) -> io::Result<Option<u32>> {
    let link = open(pin)?;
    let mut info = LinkInfo::default();
    let mut attr = GetInfo {
        bpf_fd: link.as_raw_fd() as u32,
        info_len: size_of::<LinkInfo>() as u32,
        info: ptr::from_mut(&mut info) as u64,
    };
    // SAFETY: the attribute's pointer leads to `info`, which outlives the call and has room for `info_len` bytes; any
    // bytes are a value of it.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr) }?;
    Ok((info.ifindex != 0).then_some(info.ifindex))
}

fn open(pin: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let mut attr = Get { pathname: path.as_ptr() as u64, bpf_fd: 0, file_flags: 0 };
    // SAFETY: the attribute's pointer leads to `path`, which outlives the call and ends with a zero.
    let descriptor = unsafe { bpf(BPF_OBJ_GET, &mut attr) }?;
    // SAFETY: the kernel has just opened it for us, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// `bpf(2)`; returns what the call does.
///
/// # Safety
///
/// The attribute must be the command's, and its pointers lead to memory that the command may read or write.
unsafe fn bpf<A>(command: c_int, attr: &mut A) -> io::Result<c_int> {
    // SAFETY: the attribute is of the size that is told, and the caller answers for what it points to.
    let outcome = unsafe { libc::syscall(libc::SYS_bpf, command, ptr::from_mut(attr), size_of::<A>()) };
    if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(outcome as c_int) }
}
