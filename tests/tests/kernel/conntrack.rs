//! The host's connection table: a tuple that two flows have is given to the one that is not translated.

use std::net::IpAddr;

use loden_agent::{
    family::{Family, V4, V6},
    kernel::conntrack::{self, Taken, Tuple},
};
use loden_ebpf::transport::{TCP, UDP};
use loden_tests::{netns::Netns, service::feed};

/// A pod, a service, and its backend.
struct Addresses<F: Family> {
    pod: F::Addr,
    service: F::Addr,
    backend: F::Addr,
}

impl<F: Family> Addresses<F> {
    fn new([pod, service, backend]: [&str; 3]) -> Self {
        let parse = |text: &str| F::addr(text.parse::<IpAddr>().unwrap()).unwrap();
        Self { pod: parse(pod), service: parse(service), backend: parse(backend) }
    }

    fn direct(&self, protocol: u8) -> Tuple<F> {
        Tuple { protocol, source: (self.pod, 5000), destination: (self.backend, 8080) }
    }

    /// Enters the pod's call of the service from the same port.
    fn translate(&self, host: &Netns, protocol: &str, status: &str) {
        let Self { pod, service, backend } = self;
        let bracketed = if F::BITS == 32 { backend.to_string() } else { format!("[{backend}]") };
        host.exec(&format!(
            "conntrack -I -p {protocol} -s {pod} -d {service} --sport 5000 --dport 80 \
             --dst-nat {bracketed}:8080 -t 60 {status}"
        ))
        .unwrap();
    }
}

/// A host that tracks connections.
fn host() -> Netns {
    let host = Netns::create("conntrack").unwrap();
    let rules =
        "table inet tracking { chain output { type filter hook output priority 0; ct state new accept; }; }";
    feed(&host, "nft", &["-f", "-"], rules).unwrap();
    host
}

fn entries<F: Family>(host: &Netns) -> Vec<String> {
    let family = if F::BITS == 32 { "ipv4" } else { "ipv6" };
    let table = host.exec(&format!("conntrack -L -f {family}")).unwrap();
    table.lines().filter(|line| line.contains("src=")).map(str::to_owned).collect()
}

fn tuples_are_given<F: Family>(addresses: [&str; 3]) {
    let host = host();
    let addresses = Addresses::<F>::new(addresses);
    let give = |protocol| host.run(|| conntrack::give(&addresses.direct(protocol))).unwrap();

    for (number, name, state) in [(TCP, "tcp", "--state SYN_SENT"), (UDP, "udp", "")] {
        addresses.translate(&host, name, state);
        assert_eq!(give(number), Taken::Given, "{name}: nobody has answered the translated flow");
        let entered = entries::<F>(&host);
        let [entry] = &entered[..] else { panic!("{name}: {entered:?}") };
        assert!(entry.contains(&format!("dst={} sport=5000 dport=8080", addresses.backend)), "{entry}");
        assert!(entry.contains("ASSURED") && !entry.contains("UNREPLIED"), "{entry}");
        assert_eq!(entry.contains("ESTABLISHED"), number == TCP, "{entry}");
        assert_eq!(give(number), Taken::Free, "{name}: it is the connection's own already");
        assert_eq!(entries::<F>(&host).len(), 1);

        host.exec("conntrack -F").unwrap();
        assert_eq!(give(number), Taken::Given, "{name}: the table has forgotten both");
        assert_eq!(entries::<F>(&host).len(), 1);

        host.exec("conntrack -F").unwrap();
        addresses.translate(&host, name, &format!("{state} -u SEEN_REPLY"));
        assert_eq!(give(number), Taken::Kept, "{name}: somebody has answered the translated flow");
        assert!(entries::<F>(&host)[0].contains(&format!("dst={}", addresses.service)));
        host.exec("conntrack -F").unwrap();
    }
}

#[test]
fn a_tuple_is_given_to_the_connection_that_is_not_translated() {
    tuples_are_given::<V4>(["10.5.1.2", "10.96.0.1", "10.5.2.2"]);
}

#[test]
fn a_tuple_of_ipv6_is_given_to_the_connection_that_is_not_translated() {
    tuples_are_given::<V6>(["fc00:0:0:1::2", "fd10:96::1", "fc00:0:0:2::2"]);
}
