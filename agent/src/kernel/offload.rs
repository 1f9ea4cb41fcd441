//! What a device's driver does to packets by itself.

use std::io;

use nix::{
    libc,
    sys::socket::{AddressFamily, SockFlag, SockType, socket},
};

use std::os::fd::AsRawFd as _;

/// `ETHTOOL_GGRO` of linux/ethtool.h.
const GET_GRO: u32 = 0x2b;
/// `SIOCETHTOOL` of linux/sockios.h.
const SIOCETHTOOL: u64 = 0x8946;

nix::ioctl_readwrite_bad!(ethtool, SIOCETHTOOL, libc::ifreq);

/// `struct ethtool_value` of linux/ethtool.h.
#[repr(C)]
struct Value {
    command: u32,
    data: u32,
}

/// Whether the device, of the calling thread's namespace, aggregates what it receives (GRO).
///
/// # Errors
///
/// As the kernel says: `ENODEV` where there is none of this name, `EOPNOTSUPP` where it does not say.
pub fn gro(interface: &str) -> io::Result<bool> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut value = Value { command: GET_GRO, data: 0 };
    let mut name: [libc::c_char; libc::IFNAMSIZ] = [0; libc::IFNAMSIZ];
    // The last byte stays zero.
    for (to, from) in name[..libc::IFNAMSIZ - 1].iter_mut().zip(interface.bytes()) {
        *to = from as libc::c_char;
    }
    let data = (&raw mut value).cast();
    let mut request =
        libc::ifreq { ifr_name: name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_data: data } };
    // SAFETY: the request and the value behind its pointer live until the call returns, and ETHTOOL_GGRO writes no more
    // than that value.
    unsafe { ethtool(socket.as_raw_fd(), &raw mut request) }?;
    Ok(value.data != 0)
}
