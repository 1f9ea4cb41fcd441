//! Which container is behind an endpoint, as far as something on this host names it: CNI's cache of results, Docker,
//! or a named network namespace. Asked by `loden status` alone, never by the agent; what cannot be read names nothing.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use serde_json::Value;

use crate::{
    kernel::{Kernel, Link},
    status::document::Status,
};

/// Where libcni keeps the results of ADD (cni.dev, libcni's `CacheDir`).
const CNI_CACHE: &str = "/var/lib/cni/results";
/// Docker's own socket.
const DOCKER: &str = "/var/run/docker.sock";
/// Where `ip netns` keeps names (ip-netns(8)).
const NETNS: &str = "/run/netns";
/// How long Docker may take, and how much it may say, in bytes.
const PATIENCE: (Duration, u64) = (Duration::from_secs(1), 8 << 20);
/// Most files of a directory that are looked at.
const FILES: usize = 4096;

/// Adds names of interfaces and containers to the endpoints.
pub(super) async fn add(status: &mut Status) {
    let mut names = of_netns().await;
    names.extend(of_docker(Path::new(DOCKER)));
    names.extend(of_cni(Path::new(CNI_CACHE)));
    let links = links().await;
    for endpoint in &mut status.endpoints {
        let link = links.iter().find(|link| link.index == endpoint.ifindex);
        endpoint.interface = link.map(|link| link.name.clone());
        let address = endpoint.address.parse::<Ipv4Addr>().ok();
        let by_netns = link.and_then(|link| Some(Key::Netns(link.peer_in_other_netns?)));
        let name = address.and_then(|address| names.get(&Key::Address(address)));
        endpoint.name = name.or_else(|| names.get(&by_netns?)).cloned();
    }
}

/// What a name is found by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Address(Ipv4Addr),
    /// The id by which this namespace knows the container's.
    Netns(i32),
}

type Names = BTreeMap<Key, String>;

async fn links() -> Vec<Link> {
    match Kernel::connect() {
        Ok(kernel) => kernel.links().await.unwrap_or_default(),
        Err(_) => Vec::new(),
    }
}

async fn of_netns() -> Names {
    let mut names = Names::new();
    let (Ok(kernel), Ok(entries)) = (Kernel::connect(), fs::read_dir(NETNS)) else { return names };
    for entry in entries.flatten().take(FILES) {
        let Ok(file) = File::open(entry.path()) else { continue };
        if let Ok(Some(id)) = kernel.netns_id(&file).await {
            names.insert(Key::Netns(id), entry.file_name().to_string_lossy().into_owned());
        }
    }
    names
}

fn of_docker(socket: &Path) -> Names {
    let ask = || -> std::io::Result<String> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE.0))?;
        stream.set_write_timeout(Some(PATIENCE.0))?;
        // HTTP/1.0: the answer ends with the connection, in one piece.
        stream.write_all(b"GET /containers/json HTTP/1.0\r\nHost: docker\r\n\r\n")?;
        let mut answer = String::new();
        stream.take(PATIENCE.1).read_to_string(&mut answer)?;
        Ok(answer)
    };
    let answer = ask().unwrap_or_default();
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    serde_json::from_str(body).map(|containers| docker_names(&containers)).unwrap_or_default()
}

fn docker_names(containers: &Value) -> Names {
    let mut names = Names::new();
    for container in containers.as_array().into_iter().flatten() {
        let Some(name) = container["Names"][0].as_str() else { continue };
        for network in
            container["NetworkSettings"]["Networks"].as_object().into_iter().flat_map(|n| n.values())
        {
            if let Some(address) = network["IPAddress"].as_str().and_then(|text| text.parse().ok()) {
                names.insert(Key::Address(address), name.trim_start_matches('/').to_owned());
            }
        }
    }
    names
}

fn of_cni(directory: &Path) -> Names {
    let Ok(entries) = fs::read_dir(directory) else { return Names::new() };
    let results = entries.flatten().take(FILES).filter_map(|entry| fs::read(entry.path()).ok());
    results
        .filter_map(|text| serde_json::from_slice(&text).ok())
        .flat_map(|result| cni_names(&result))
        .collect()
}

/// The pod's name where the runtime gave one (Kubernetes does), else the container's id.
fn cni_names(cached: &Value) -> Names {
    let arguments = cached["cniArgs"].as_array();
    let argument = |name: &str| {
        let pair = arguments?.iter().find(|pair| pair[0] == name)?;
        pair[1].as_str().map(str::to_owned)
    };
    let pod = argument("K8S_POD_NAMESPACE").zip(argument("K8S_POD_NAME"));
    let name = match pod {
        Some((namespace, pod)) => format!("{namespace}/{pod}"),
        None => match cached["containerId"].as_str() {
            Some(id) => id.chars().take(12).collect(),
            None => return Names::new(),
        },
    };
    let addresses = cached["result"]["ips"].as_array().into_iter().flatten().filter_map(|ip| {
        let text = ip["address"].as_str()?;
        text.split('/').next()?.parse::<IpAddr>().ok()
    });
    addresses
        .filter_map(|address| match address {
            IpAddr::V4(address) => Some((Key::Address(address), name.clone())),
            IpAddr::V6(_) => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn by_address(names: &Names, address: [u8; 4]) -> Option<&str> {
        names.get(&Key::Address(address.into())).map(String::as_str)
    }

    #[test]
    fn docker_names_its_containers_by_their_addresses() {
        let names = docker_names(&json!([
            { "Names": ["/web"], "NetworkSettings": { "Networks": { "bridge": { "IPAddress": "10.5.1.2" } } } },
            { "Names": ["/host"], "NetworkSettings": { "Networks": { "host": { "IPAddress": "" } } } },
            { "Names": null },
        ]));
        assert_eq!(by_address(&names, [10, 5, 1, 2]), Some("web"));
        assert_eq!(names.len(), 1);
        assert!(docker_names(&json!({ "message": "no" })).is_empty());
    }

    #[test]
    fn a_pod_is_named_by_its_namespace_and_name_and_others_by_their_id() {
        let ips = json!({ "ips": [{ "address": "10.5.1.3/24" }, { "address": "fd00::3/64" }] });
        let names = cni_names(&json!({
            "containerId": "0123456789abcdef",
            "cniArgs": [["IgnoreUnknown", "1"], ["K8S_POD_NAMESPACE", "shop"], ["K8S_POD_NAME", "cart-0"]],
            "result": ips,
        }));
        assert_eq!(by_address(&names, [10, 5, 1, 3]), Some("shop/cart-0"));
        let names = cni_names(&json!({ "containerId": "0123456789abcdef", "result": ips }));
        assert_eq!(by_address(&names, [10, 5, 1, 3]), Some("0123456789ab"));
        assert!(cni_names(&json!({ "result": 7 })).is_empty());
    }

    #[test]
    fn what_is_not_there_names_nothing() {
        assert!(of_docker(Path::new("/nonexistent/docker.sock")).is_empty());
        assert!(of_cni(Path::new("/nonexistent")).is_empty());
    }
}
