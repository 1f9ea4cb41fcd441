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
    V4_NETWORK: u32 = 0;
    V4_NETWORK_MASK: u32 = 0;
    V4_GRID_SHIFT: u32 = 0;
    V4_SUBNET: u32 = 0;
    V4_SUBNET_MASK: u32 = 0;
    V4_VTEP: u32 = 0;
    V4_VTEP_MAC: [u16; 3] = [0; 3];
    V4_VNI: u32 = 0;
    V4_PORT: u16 = 0;
    SOURCE_PORT_MIN: u16 = 0;
    SOURCE_PORT_MAX: u16 = 0;
    V4_OUTER_TTL: u8 = 64;
    STRICT: u8 = 1;
    DROP_FORGED: u8 = 1;
    COARSE_CLOCK: u8 = 1;
    BARE_DEVICE: u8 = 0;
    HAS_V6: u8 = 1;
    V6_GRID: [u64; 2] = [0; 2];
    V6_GRID_MASK: [u64; 2] = [0; 2];
    V6_SUBNET_LEN: u32 = 64;
    V6_SUBNET: [u64; 2] = [0; 2];
    V6_SUBNET_MASK: [u64; 2] = [0; 2];
    V6_VTEP: [u64; 2] = [0; 2];
    V6_VTEP_MAC: [u16; 3] = [0; 3];
    V6_VNI: u32 = 0;
    V6_PORT: u16 = 0;
    V6_OUTER_HOPS: u8 = 64;
    V6_DEVICE: u32 = 0;
}
