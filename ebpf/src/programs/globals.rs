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
