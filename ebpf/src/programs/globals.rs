//! What is constant for as long as the programs are loaded. The loader writes it into read-only data, so the
//! verifier knows the values and removes the branches that they rule out.

use aya_ebpf::Global;

macro_rules! globals {
    ($($name:ident: $type:ty = $default:expr;)+) => {
        $(
            #[unsafe(no_mangle)]
            pub(super) static $name: Global<$type> = Global::new($default);
        )+
    };
}

globals! {
    NETWORK: u32 = 0;
    NETWORK_MASK: u32 = 0;
    GRID_SHIFT: u32 = 0;
    SUBNET: u32 = 0;
    SUBNET_MASK: u32 = 0;
    VTEP: u32 = 0;
    VTEP_MAC: [u16; 3] = [0; 3];
    VNI: u32 = 0;
    PORT: u16 = 0;
    SOURCE_PORT_MIN: u16 = 0;
    SOURCE_PORT_MAX: u16 = 0;
    OUTER_TTL: u8 = 64;
    STRICT: u8 = 1;
    DROP_FORGED: u8 = 1;
    COARSE_CLOCK: u8 = 1;
}

/// The MAC of the VXLAN device. It is read in words, since a volatile read of bytes is a load for each of them.
#[inline(always)]
pub(super) fn vtep_mac() -> [u8; 6] {
    let [a, b, c] = VTEP_MAC.load().map(u16::to_ne_bytes);
    [a[0], a[1], b[0], b[1], c[0], c[1]]
}
