//! What the programs need of the kernel: asked of the kernel itself once it has refused them, so that the operator
//! reads a name and a version and not the verifier's log.

use aya::{
    maps::MapType,
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported, is_map_supported, is_program_supported},
};

use super::DataplaneError;

/// Helpers that the TC programs cannot do without, and the release of Linux that brought each.
const HELPERS: &[(BpfHelper, &str, &str)] = &[
    (BpfHelper::BPF_FUNC_csum_level, "bpf_csum_level", "5.8"),
    (BpfHelper::BPF_FUNC_ringbuf_output, "bpf_ringbuf_output", "5.8"),
    (BpfHelper::BPF_FUNC_redirect_neigh, "bpf_redirect_neigh", "5.10"),
    (BpfHelper::BPF_FUNC_redirect_peer, "bpf_redirect_peer", "5.10"),
];

const MAPS: &[(MapType, &str, &str)] =
    &[(MapType::LruHash, "LRU hash maps", "4.10"), (MapType::RingBuf, "BPF ring buffers", "5.8")];

/// Why the kernel refused: what it lacks, where it lacks something; else its own words.
pub(super) fn refused(error: anyhow::Error) -> DataplaneError {
    let missing = missing();
    if missing.is_empty() { DataplaneError::Load(error) } else { DataplaneError::Lacks(missing) }
}

/// Whether TC programs may ask for the coarse time (Linux 5.11). A kernel that does not say is taken for a new one.
pub(super) fn has_coarse_clock() -> bool {
    has_helper(BpfHelper::BPF_FUNC_ktime_get_coarse_ns)
}

/// Names what the kernel is sure not to have; empty, too, where it does not say.
fn missing() -> Vec<String> {
    if !may_load() {
        return vec!["permission to load programs (CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN)".to_owned()];
    }
    if matches!(is_program_supported(ProgramType::SchedClassifier), Ok(false)) {
        return vec!["TC programs (Linux 4.1, CONFIG_NET_CLS_BPF)".to_owned()];
    }
    let helpers = HELPERS.iter().map(|(helper, name, since)| (has_helper(*helper), *name, *since));
    let maps = MAPS.iter().map(|(map, name, since)| (is_map_supported(*map).unwrap_or(true), *name, *since));
    name_missing(helpers.chain(maps))
}

/// Whether the kernel lets us load anything at all: the smallest map is refused for no other reason.
fn may_load() -> bool {
    let refused = |error: &std::io::Error| error.kind() == std::io::ErrorKind::PermissionDenied;
    !matches!(is_map_supported(MapType::LruHash), Err(error) if refused(&error.io_error))
}

fn has_helper(helper: BpfHelper) -> bool {
    is_helper_supported(ProgramType::SchedClassifier, helper).unwrap_or(true)
}

fn name_missing<'a>(asked: impl Iterator<Item = (bool, &'a str, &'a str)>) -> Vec<String> {
    asked.filter(|(has, ..)| !has).map(|(_, name, since)| format!("{name} (Linux {since})")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_missing_is_named_with_the_release_that_has_it() {
        let asked = [(true, "bpf_csum_level", "5.8"), (false, "bpf_redirect_peer", "5.10")];
        let missing = name_missing(asked.into_iter());
        assert_eq!(
            DataplaneError::Lacks(missing).to_string(),
            "no eBPF: there is no bpf_redirect_peer (Linux 5.10)"
        );
    }
}
