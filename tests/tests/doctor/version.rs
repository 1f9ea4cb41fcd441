//! Programs of another version than the command that looks.

use std::{fs, ops::Range, os::unix::fs::PermissionsExt as _, path::PathBuf, time::Duration};

use loden_tests::{
    cluster::{Cluster, Plan},
    node::{Node, binary},
    process::wait_for,
};
use object::{Object as _, ObjectSection as _};

use crate::ward::{assert_found, links};

/// A copy of the built binary whose programs end with another verdict where they pass a packet on: with `TC_ACT_OK` (0)
/// instead of `TC_ACT_UNSPEC` (-1), which means the same where no program comes after them.
fn of_another_version(node: &Node) -> PathBuf {
    /// The second byte of `ld_imm64` names the register.
    fn loads_unspec(pair: &[u8]) -> bool {
        pair[0] == 0x18 && pair[2..] == [0, 0, 255, 255, 255, 255, 0, 0, 0, 0, 0, 0, 0, 0]
    }
    let mut binary = fs::read(binary().unwrap()).unwrap();
    let programs = programs_in(&binary);
    let mut changed = 0;
    for at in programs.step_by(8) {
        if loads_unspec(&binary[at..at + 16]) {
            binary[at + 4..at + 8].fill(0);
            changed += 1;
        }
    }
    assert!(changed >= 6, "{changed} verdicts found in the programs");
    let path = node.directory().join("loden-of-another-version");
    fs::write(&path, binary).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// Where the code of the programs for TC stands in the binary, but for their last instruction.
fn programs_in(binary: &[u8]) -> Range<usize> {
    // It is aligned, for it is read in place.
    let object = |at: usize| {
        let object =
            object::File::parse(binary[at..].starts_with(b"\x7fELF").then_some(&binary[at..])?).ok()?;
        let programs = object.section_by_name("classifier")?.file_range()?;
        let start = at + usize::try_from(programs.0).ok()?;
        Some(start..start + usize::try_from(programs.1).ok()? - 8)
    };
    // The binary is such a file itself.
    (8..binary.len()).step_by(8).find_map(object).expect("the programs' object in the binary")
}

#[test]
fn programs_of_another_version_are_found_and_well_once_the_agent_is_of_it_too() {
    let mut cluster = Cluster::start(&Plan { nodes: 1, ..Plan::default() }, &[]).unwrap();
    let _containers = cluster.run_containers(1).unwrap();
    let node = &mut cluster.nodes[0];
    wait_for("the programs at the container's veth", Duration::from_secs(20), || {
        links(node).iter().any(|path| path.display().to_string().contains("to_pod")).then_some(())
    })
    .unwrap();
    assert_found("one version", node, &[]);

    node.set_binary(of_another_version(node));
    let report = assert_found("an older agent", node, &["programs"]);
    let found = report.find("programs");
    assert_eq!(found["outcome"], "warning", "{found:#}");
    let evidence = found["evidence"].as_str().unwrap();
    assert!(evidence.contains("of another version than this command: from_pod at veth1"), "{evidence}");
    assert!(found["remedy"].as_str().unwrap().contains("restart the agent"), "{found:#}");

    node.stop_agent().unwrap();
    node.start_agent(&[]).unwrap();
    assert_found("an agent of this version", node, &[]);
}
