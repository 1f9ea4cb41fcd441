//! Flows that the host translates: their replies must pass the host again.

use loden_tests::{
    cluster::Cluster,
    each_family,
    family::Family,
    service::at,
    traffic::{
        Service, hello, ping,
        stream::{self, Until},
    },
};

const BACKEND: u16 = 8080;

each_family!(
    replies_to_a_service_address_are_translated_back,
    replies_to_a_service_address_are_translated_back_with_the_gate_open,
);

fn replies_to_a_service_address_are_translated_back<F: Family>() {
    assert_translated_back::<F>("strict");
}

fn replies_to_a_service_address_are_translated_back_with_the_gate_open<F: Family>() {
    assert_translated_back::<F>("open");
}

fn assert_translated_back<F: Family>(gate: &str) {
    let (cluster, containers) = Cluster::start_with_containers(&F::plan(), &["--gate", gate]).unwrap();
    let (client, server) = (F::host(&containers[0]), F::host(&containers[1]));
    let (front, backend) = (at(F::vip(10), 80), at(server.address, BACKEND));
    cluster.nodes[0]
        .netns()
        .exec(&format!(
            "{} -t nat -A PREROUTING -d {} -p tcp --dport {} -j DNAT --to-destination {backend}",
            F::IPTABLES,
            front.ip(),
            front.port(),
        ))
        .unwrap();
    // Both know each other before: the direct flow is fast, and the translated one must not be taken for it.
    ping(client.netns, server.address, 20).unwrap();
    stream::run(client, server, None, Until::Bytes(10_000_000)).unwrap();
    let service = Some(Service { front, backend: BACKEND });
    for round in 0..5 {
        let seen = hello(client, server, service).unwrap_or_else(|error| panic!("round {round}: {error:#}"));
        assert_eq!(seen, client.address, "DNAT alone leaves the source as it is");
    }
    let stream = stream::run(client, server, service, Until::Bytes(50_000_000)).unwrap();
    assert_eq!((stream.bytes, stream.source), (50_000_000, client.address));
    let direct = stream::run(client, server, None, Until::Bytes(10_000_000)).unwrap();
    assert_eq!(direct.source, client.address);
}
