//! Another version of the programs takes over: their links are swapped in place, their maps are built beside.
//!
//! What an agent of another ABI version leaves is made of what this one has left: its directory gets the name
//! that the other version would have used. What is in it is not read, so it need not differ.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::ErrorKind,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use aya::programs::{ProgramError, SchedClassifier, TcAttachType};
use loden_ebpf::abi::ABI_VERSION;
use loden_tests::{
    cluster::Cluster,
    container::Container,
    each_family,
    family::Family,
    node::{BRIDGE, Node},
    process::wait_for,
    traffic::{load, ping},
};
use nix::sched::{CloneFlags, setns};

use crate::assert_bulk_is_fast;

each_family!(
    an_older_versions_programs_are_replaced_in_place_and_its_maps_removed,
    a_newer_versions_programs_are_replaced_in_place_and_its_maps_removed,
    a_map_of_another_shape_is_replaced_and_the_programs_swapped_in_place,
    cleanup_removes_what_other_versions_have_left,
);

const HOOKS: usize = 6;

/// Where the programs are on a node that has this family and no other.
fn hooks<F: Family>() -> [(&'static str, TcAttachType); HOOKS] {
    [
        ("eth0", TcAttachType::Ingress),
        (BRIDGE, TcAttachType::Ingress),
        (F::DEVICE, TcAttachType::Ingress),
        (F::DEVICE, TcAttachType::Egress),
        ("veth1", TcAttachType::Ingress),
        ("veth1", TcAttachType::Egress),
    ]
}

/// Asks the kernel for the programs at each hook, again and again, and wants exactly one each time. Returns the
/// ids of all that it found.
fn watch_hooks<F: Family>(netns: &Path, stop: &AtomicBool) -> BTreeSet<u32> {
    setns(File::open(netns).unwrap(), CloneFlags::CLONE_NEWNET).unwrap();
    let mut programs = BTreeSet::new();
    while !stop.load(Ordering::Acquire) {
        for (interface, side) in hooks::<F>() {
            let found = match SchedClassifier::query_tcx(interface, side) {
                Ok((_, found)) => found,
                // The program was exchanged, and is gone, between the question which one it is and what it is.
                Err(ProgramError::SyscallError(error)) if error.io_error.kind() == ErrorKind::NotFound => {
                    continue;
                }
                Err(error) => panic!("{interface} {side:?}: {error}"),
            };
            assert_eq!(found.len(), 1, "{interface} {side:?}");
            programs.extend(found.iter().map(|program| program.id()));
        }
    }
    programs
}

/// Stops the agent of a node, lets `change` prepare what the next one finds, starts that, and wants that no packet
/// noticed and no hook was ever empty.
fn assert_takes_over<F: Family>(change: impl FnOnce(&Node)) -> (Cluster, Vec<Container>) {
    let (mut cluster, containers) = Cluster::start_with_containers(&F::alone(), &[]).unwrap();
    let (a, b) = (&containers[0], &containers[1]);
    ping(a.netns(), F::of(b), 20).unwrap();
    let netns = cluster.nodes[0].netns().path();
    let stop = AtomicBool::new(false);
    let (programs, report) = thread::scope(|scope| {
        let watch = scope.spawn(|| watch_hooks::<F>(&netns, &stop));
        let node = &mut cluster.nodes[0];
        let loaded = load::during(F::host(a), F::host(b), 10, || {
            assert!(node.stop_agent()?.success());
            change(node);
            node.start_agent(&[])
        });
        stop.store(true, Ordering::Release);
        (watch.join().unwrap(), loaded.unwrap().1)
    });
    assert_eq!((report.lost, report.repeated), (0, 0), "{report:?}");
    assert_eq!(programs.len(), 2 * HOOKS, "the old programs and the new ones: {programs:?}");
    assert_bulk_is_fast(&cluster.nodes, a, b);
    (cluster, containers)
}

fn names(directory: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(directory).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn assert_switches_from<F: Family>(version: u32) {
    let own = format!("v{ABI_VERSION}");
    let (mut cluster, _containers) = assert_takes_over::<F>(|node| {
        fs::rename(node.bpffs().join(&own), node.bpffs().join(format!("v{version}"))).unwrap();
    });
    let node = &mut cluster.nodes[0];
    assert_eq!(
        names(node.bpffs()),
        [own.clone()].into(),
        "the other version's pins are gone: {}",
        node.log()
    );
    assert_eq!(names(&node.bpffs().join(own).join("links")).len(), HOOKS);
    assert!(node.log().contains("another version"), "{}", node.log());
}

fn an_older_versions_programs_are_replaced_in_place_and_its_maps_removed<F: Family>() {
    assert_switches_from::<F>(ABI_VERSION - 1);
}

fn a_newer_versions_programs_are_replaced_in_place_and_its_maps_removed<F: Family>() {
    assert_switches_from::<F>(ABI_VERSION + 1);
}

fn a_map_of_another_shape_is_replaced_and_the_programs_swapped_in_place<F: Family>() {
    let pin = |node: &Node, map: &str| {
        node.bpffs().join(format!("v{ABI_VERSION}")).join(format!("{}{map}", F::MAPS))
    };
    let (cluster, _containers) = assert_takes_over::<F>(|node| {
        let address = F::BITS / 8;
        for (map, shape) in [
            ("PEERS", "type array key 4 value 16 entries 256".to_owned()),
            ("ENDPOINTS", "type array key 4 value 16 entries 64".to_owned()),
            // The right sizes, and yet another map.
            ("VTEPS", format!("type lru_hash key {address} value 4 entries 65536")),
        ] {
            let path = pin(node, map);
            fs::remove_file(&path).unwrap();
            let path = path.display();
            node.netns().exec(&format!("bpftool map create {path} {shape} name {map}")).unwrap();
        }
    });
    for map in ["PEERS", "ENDPOINTS", "VTEPS"] {
        let shown = cluster.nodes[0]
            .netns()
            .exec(&format!("bpftool map show pinned {}", pin(&cluster.nodes[0], map).display()));
        let shown = shown.unwrap();
        assert!(
            !shown.contains("lru_hash") && !shown.contains("value 16B") && !shown.contains("max_entries 64 "),
            "{shown}"
        );
    }
}

fn cleanup_removes_what_other_versions_have_left<F: Family>() {
    let (mut cluster, containers) = Cluster::start_with_containers(&F::alone(), &[]).unwrap();
    let node = &mut cluster.nodes[0];
    node.stop_agent().unwrap();
    fs::rename(node.bpffs().join(format!("v{ABI_VERSION}")), node.bpffs().join("v77")).unwrap();
    let file = node.subnet_file().display().to_string();
    node.loden(&["cleanup", "--keep-kernel", "--subnet-file", &file]).unwrap();
    assert!(!node.bpffs().exists(), "{:?}", names(node.bpffs()));
    for (interface, side) in hooks::<F>() {
        // The kernel takes a link off its hook a moment after its last reference is gone.
        wait_for("an empty hook", Duration::from_secs(2), || {
            let programs = node.netns().run(|| SchedClassifier::query_tcx(interface, side));
            programs.is_ok_and(|(_, programs)| programs.is_empty()).then_some(())
        })
        .unwrap_or_else(|error| panic!("{interface} {side:?}: {error:#}"));
    }
    crate::assert_all_reach_all(&containers);
}
