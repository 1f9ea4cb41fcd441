//! What the programs need of the kernel: asked of the kernel itself once it has refused them, so that the operator
//! reads a name and a version and not the verifier's log.

use aya::{
    maps::MapType,
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported, is_map_supported, is_program_supported},
};

use super::DataplaneError;

/// Helpers of the TC programs that not every kernel has, and the release of Linux that brought each.
///
/// The growing of a packet needs more, which cannot be asked for: `BPF_F_ADJ_ROOM_ENCAP_L2_ETH` (5.13). No
/// long-term kernel lies between.
const HELPERS: &[(BpfHelper, &str, &str)] = &[
    (BpfHelper::BPF_FUNC_csum_level, "bpf_csum_level", "5.8"),
    (BpfHelper::BPF_FUNC_ringbuf_output, "bpf_ringbuf_output", "5.8"),
    (BpfHelper::BPF_FUNC_redirect_neigh, "bpf_redirect_neigh", "5.10"),
    (BpfHelper::BPF_FUNC_redirect_peer, "bpf_redirect_peer", "5.10"),
    (BpfHelper::BPF_FUNC_ktime_get_coarse_ns, "bpf_ktime_get_coarse_ns", "5.11"),
];

const MAPS: &[(MapType, &str, &str)] =
    &[(MapType::LruHash, "LRU hash maps", "4.10"), (MapType::RingBuf, "BPF ring buffers", "5.8")];

/// Why the kernel refused: what it lacks, where it lacks something; else its own words.
pub(super) fn refused(error: anyhow::Error) -> DataplaneError {
    let missing = missing();
    if missing.is_empty() { DataplaneError::Load(error) } else { DataplaneError::Lacks(missing) }
}

/// Names what the kernel is sure not to have. Empty, too, where it does not say (without privileges).
fn missing() -> Vec<String> {
    if matches!(is_program_supported(ProgramType::SchedClassifier), Ok(false)) {
        return vec!["TC programs (Linux 4.1, CONFIG_NET_CLS_BPF)".to_owned()];
    }
    let lacks =
        |supported: bool, name: &str, since: &str| (!supported).then(|| format!("{name} (Linux {since})"));
    let helpers = HELPERS.iter().filter_map(|(helper, name, since)| {
        lacks(is_helper_supported(ProgramType::SchedClassifier, *helper).unwrap_or(true), name, since)
    });
    let maps = MAPS
        .iter()
        .filter_map(|(map, name, since)| lacks(is_map_supported(*map).unwrap_or(true), name, since));
    helpers.chain(maps).collect()
}
