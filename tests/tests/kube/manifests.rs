//! What is applied to a cluster: the plain manifests, and the chart as helm itself renders it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use loden_agent::{
    cli::{self, Command},
    config::Config,
    network::NetworkConfig,
};
use loden_tests::{helm, kubernetes_validate, netns, node};
use serde_json::{Value, json};

use crate::{
    server::Cut,
    source::{Source, cluster_of, mac},
};

fn deploy(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(path)
}

fn read(path: &str) -> String {
    let path = deploy(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn yaml(text: &str) -> Value {
    serde_saphyr::from_str(text).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

/// The documents of a YAML file, those without content left out.
fn documents(text: &str) -> Vec<Value> {
    let parts =
        text.split("\n---").map(str::trim).filter(|part| part.lines().any(|line| !line.starts_with('#')));
    parts.map(yaml).collect()
}

/// Helm's answer to this command about the chart with these values over its own, in the namespace `loden`.
fn helm(words: &[&str], values: &Value) -> anyhow::Result<String> {
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("values.yaml");
    fs::write(&file, values.to_string())?;
    let mut command = std::process::Command::new(helm::program()?);
    for home in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
        command.env(home, directory.path());
    }
    command.args(words).arg(deploy("helm/loden")).args(["--namespace=loden", "--values"]).arg(&file);
    netns::output(&mut command)
}

/// What would be applied.
fn render(values: &Value) -> Vec<Value> {
    documents(&helm(&["template", "loden"], values).unwrap())
}

/// Everything that somebody may choose, one after the other.
fn variants() -> Vec<(&'static str, Value)> {
    vec![
        ("defaults", json!({})),
        ("etcd", json!({ "leases": "etcd" })),
        (
            "etcd-plain",
            json!({ "leases": "etcd", "etcd": { "secret": "", "endpoints": "http://10.0.0.1:2379,http://10.0.0.2:2379" } }),
        ),
        ("no-cni", json!({ "cni": { "install": false } })),
        ("no-metrics", json!({ "metrics": { "port": 0 } })),
        ("dual", json!({ "netConf": { "EnableIPv6": true, "IPv6Network": "fd00:244::/48" } })),
        (
            "ipv6-only",
            json!({
                "netConf": { "EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:244::/48" },
                "metrics": { "host": "[::]" },
            }),
        ),
        (
            "more",
            json!({
                "extraArgs": ["--iface=eth1", "--log-format=json", "--xdp=auto"],
                "kubernetesServiceHost": "10.0.0.10", "kubernetesServicePort": "6443",
                "image": { "repository": "registry.example/loden", "tag": "v1", "pullSecrets": [{ "name": "pull" }] },
                "netConf": { "Network": "10.0.0.0/8", "Backend": { "Type": "host-gw" } },
                "gate": "open", "datapath": "kernel", "ipMasq": false,
            }),
        ),
    ]
}

fn of_kind<'a>(documents: &'a [Value], kind: &str) -> Option<&'a Value> {
    documents.iter().find(|document| document["kind"] == kind)
}

/// By kind and name. ConfigMaps hold JSON as text: what it says counts, not its blanks.
fn comparable(documents: Vec<Value>) -> BTreeMap<String, Value> {
    let mut objects = BTreeMap::new();
    for mut document in documents.into_iter().filter(|document| document["kind"] != "Namespace") {
        if document["kind"] == "ConfigMap" {
            for value in document["data"].as_object_mut().unwrap().values_mut() {
                *value = serde_json::from_str(value.as_str().unwrap()).unwrap();
            }
        }
        let name = format!("{} {}", document["kind"], document["metadata"]["name"]);
        assert_eq!(objects.insert(name, document), None);
    }
    objects
}

/// Takes the checksum of the configuration out of the pods' template, which plain manifests have not.
fn take_checksum(rendered: &mut [Value]) -> String {
    let daemon_set = rendered.iter_mut().find(|document| document["kind"] == "DaemonSet").unwrap();
    let metadata = daemon_set["spec"]["template"]["metadata"].as_object_mut().unwrap();
    let annotations = metadata.remove("annotations").unwrap();
    let checksum = annotations["checksum/config"].as_str().unwrap().to_owned();
    assert_eq!(annotations, json!({ "checksum/config": checksum }));
    checksum
}

#[test]
fn the_plain_manifests_are_what_the_chart_makes() {
    for (file, values) in
        [("kube/loden.yml", json!({})), ("kube/loden-etcd.yml", json!({ "leases": "etcd" }))]
    {
        let mut rendered = render(&values);
        take_checksum(&mut rendered);
        assert_eq!(comparable(documents(&read(file))), comparable(rendered), "{file}");
    }
}

#[test]
fn the_checksum_by_which_pods_are_rolled_out_anew_is_that_of_the_configuration() {
    let checksum = |values: Value| take_checksum(&mut render(&values));
    let before = checksum(json!({}));
    assert_eq!(before.len(), 64, "{before}");
    assert_eq!(checksum(json!({ "gate": "open", "netConf": { "Network": "10.244.0.0/16" } })), before);
    for changed in [
        json!({ "netConf": { "Network": "10.245.0.0/16" } }),
        json!({ "cni": { "conf": { "name": "cbr1" } } }),
        json!({ "leases": "etcd", "cni": { "conf": { "name": "cbr1" } } }),
    ] {
        assert_ne!(checksum(changed.clone()), before, "{changed}");
    }
}

/// What undoes Loden on a node finds what Loden's pods have left there, on the same nodes.
#[test]
fn the_cleanup_has_the_agents_image_places_and_nodes_and_keeps_the_kernel() {
    let pods = |file: &str| {
        let documents = documents(&read(file));
        of_kind(&documents, "DaemonSet").unwrap()["spec"]["template"]["spec"].clone()
    };
    let (loden, cleanup) = (pods("kube/loden.yml"), pods("kube/loden-cleanup.yml"));
    for same in ["hostNetwork", "nodeSelector", "tolerations", "priorityClassName", "imagePullSecrets"] {
        assert_eq!(cleanup[same], loden[same], "{same}");
    }
    let (agent, container) = (&loden["containers"][0], &cleanup["initContainers"][0]);
    for same in ["image", "imagePullPolicy", "securityContext"] {
        assert_eq!(container[same], agent[same], "{same}");
    }
    assert_eq!(cleanup["containers"][0]["image"], agent["image"]);
    let on_the_node = |list: &Value| -> Vec<Value> {
        let is_ours =
            |one: &&Value| !["config", "cni-bin", "cni-conf"].contains(&one["name"].as_str().unwrap());
        list.as_array().unwrap().iter().filter(is_ours).cloned().collect()
    };
    let mounts = on_the_node(&agent["volumeMounts"]);
    assert_eq!(mounts.len(), 4, "{mounts:?}");
    assert_eq!(container["volumeMounts"], json!(mounts));
    assert_eq!(cleanup["volumes"], json!(on_the_node(&loden["volumes"])));
    let parsed = cli::parse(words(container), &|_| None).unwrap_or_else(|exit| panic!("{}", exit.text));
    let Command::Cleanup(args) = parsed else { panic!("{parsed:?}") };
    assert!(args.keep_kernel);
    Config::from_args(args.agent).unwrap();
}

/// The command line of a container.
fn words(container: &Value) -> Vec<std::ffi::OsString> {
    let words = ["command", "args"].into_iter().flat_map(|list| container[list].as_array().unwrap());
    words.map(|word| word.as_str().unwrap().into()).collect()
}

#[test]
fn every_variant_fits_the_schemas_of_old_and_new_kubernetes() {
    let directory = tempfile::tempdir().unwrap();
    let mut files =
        ["loden.yml", "loden-etcd.yml", "loden-cleanup.yml"].map(|name| deploy("kube").join(name)).to_vec();
    for (name, values) in variants() {
        let file = directory.path().join(format!("{name}.yml"));
        let text: Vec<String> = render(&values).iter().map(ToString::to_string).collect();
        fs::write(&file, text.join("\n---\n")).unwrap();
        files.push(file);
    }
    let validate = |version: &str, files: &[PathBuf]| {
        let mut command = std::process::Command::new(kubernetes_validate::program().unwrap());
        netns::output(command.args(["--strict", "--quiet", "-k", version]).args(files))
    };
    for version in ["1.25", kubernetes_validate::NEWEST] {
        validate(version, &files).unwrap_or_else(|error| panic!("{version}: {error:#}"));
    }
    // What would be wrong is found.
    for (wrong, right) in
        [("hostNetwork: yes-please", "hostNetwork: true"), ("hostnetwork: true", "hostNetwork: true")]
    {
        let file = directory.path().join("wrong.yml");
        fs::write(&file, read("kube/loden.yml").replace(right, wrong)).unwrap();
        validate(kubernetes_validate::NEWEST, &[file]).unwrap_err();
    }
}

#[test]
fn helm_finds_nothing_to_complain_of_and_refuses_values_that_there_are_not() {
    for (name, values) in variants() {
        helm(&["lint", "--strict"], &values).unwrap_or_else(|error| panic!("{name}: {error:#}"));
    }
    for (what, wrong) in [
        ("leases", json!({ "leases": "both" })),
        ("gate", json!({ "gate": "ajar" })),
        ("port", json!({ "healthz": { "port": 0 } })),
        ("confName", json!({ "cni": { "confName": "a" } })),
        ("IPv6Network", json!({ "netConf": { "EnableIPv6": true } })),
        ("netConf", json!({ "netConf": { "EnableIPv4": false } })),
        ("gates", json!({ "gates": "open" })),
        ("pullpolicy", json!({ "image": { "pullpolicy": "Always" } })),
    ] {
        for words in [&["lint"][..], &["template", "loden"]] {
            let error = format!("{:#}", helm(words, &wrong).unwrap_err());
            assert!(error.contains(what), "{what}: {error}");
        }
    }
}

#[test]
fn the_agent_takes_every_flag_and_the_network_config() {
    for (name, values) in variants() {
        let rendered = render(&values);
        let daemon_set = of_kind(&rendered, "DaemonSet").unwrap();
        let agent = &daemon_set["spec"]["template"]["spec"]["containers"][0];
        let parsed =
            cli::parse(words(agent), &|_| None).unwrap_or_else(|exit| panic!("{name}: {}", exit.text));
        let Command::Agent(args) = parsed else { panic!("{name}: no agent") };
        let config = Config::from_args(args).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(config.warnings, Vec::<String>::new(), "{name}");
        let data = &of_kind(&rendered, "ConfigMap").unwrap()["data"];
        assert_eq!(config.kube.is_some(), data["net-conf.json"].is_string(), "{name}");
        if let Some(text) = data["net-conf.json"].as_str() {
            let network = NetworkConfig::parse_for_given_subnets(text).unwrap();
            assert_eq!(
                (network.v4.is_some(), network.v6.is_some()),
                (name != "ipv6-only", ["dual", "ipv6-only"].contains(&name))
            );
        }
        let cni: Value = serde_json::from_str(data["cni-conf.json"].as_str().unwrap()).unwrap();
        assert_eq!(cni["plugins"][0]["type"], "flannel");
        // The kubelet asks where the agent answers.
        let health = config.healthz.unwrap();
        for probe in ["livenessProbe", "readinessProbe"] {
            let get = &agent[probe]["httpGet"];
            assert_eq!(
                (get["host"].as_str().unwrap(), get["port"].as_u64().unwrap()),
                ("127.0.0.1", u64::from(health.port()))
            );
            assert!(health.ip().is_loopback());
        }
        let ports: Vec<u64> = agent["ports"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|p| p["containerPort"].as_u64().unwrap())
            .collect();
        assert_eq!(
            ports,
            config.metrics_addr.map(|address| u64::from(address.port())).into_iter().collect::<Vec<_>>()
        );
        // What the agent writes must outlive its container.
        let mounted = |path: &str| {
            agent["volumeMounts"].as_array().unwrap().iter().any(|mount| mount["mountPath"] == *path)
        };
        let file = config.subnet_file.parent().unwrap().to_str().unwrap();
        for path in [
            file,
            config.run_dir.to_str().unwrap(),
            config.bpffs_dir.parent().unwrap().to_str().unwrap(),
            "/run/xtables.lock",
        ] {
            assert!(mounted(path), "{name}: {path} is not mounted");
        }
    }
}

/// The init container's command as it stands, but for the directories.
#[test]
fn the_init_container_installs_the_plugin_under_both_names_and_the_configuration() {
    let directory = tempfile::tempdir().unwrap();
    let at = |path: &str| directory.path().join(path);
    let rendered = render(&json!({}));
    let daemon_set = of_kind(&rendered, "DaemonSet").unwrap();
    let init = &daemon_set["spec"]["template"]["spec"]["initContainers"][0];
    for mount in init["volumeMounts"].as_array().unwrap() {
        fs::create_dir_all(at(mount["mountPath"].as_str().unwrap().trim_start_matches('/'))).unwrap();
    }
    let conf = of_kind(&rendered, "ConfigMap").unwrap()["data"]["cni-conf.json"].as_str().unwrap();
    fs::write(at("etc/kube-flannel/cni-conf.json"), conf).unwrap();
    let words = ["command", "args"].into_iter().flat_map(|list| init[list].as_array().unwrap());
    let root = directory.path().display().to_string();
    let words: Vec<String> =
        words.map(|word| word.as_str().unwrap().replace("=/", &format!("={root}/"))).collect();
    let program = node::binary().unwrap().with_file_name(&words[0]);
    for time in ["first", "second"] {
        netns::output(std::process::Command::new(&program).args(&words[1..]))
            .unwrap_or_else(|error| panic!("the {time} time: {error:#}"));
    }
    for name in ["loden-cni", "flannel"] {
        assert!(at("host/opt/cni/bin").join(name).is_file(), "{name}");
    }
    assert_eq!(fs::read_to_string(at("host/etc/cni/net.d/10-flannel.conflist")).unwrap(), conf);
}

/// What the agent asks of the API is what its ClusterRole allows, and nothing is allowed that it does not ask.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_cluster_role_allows_just_what_the_agent_asks() {
    let server = cluster_of(2);
    let source = Source::start(&server).await;
    server.store().add_node("n3", Some("10.244.3.0/24"));
    server.store().annotate_as_flannel("n3", "192.168.64.3", &mac(3));
    source.until_peers(&[2, 3]).await;
    server.store().cut(Cut::Clean);
    server.until("the next watch", |store| store.watches().len() >= 2);
    tokio::time::sleep(Duration::from_millis(200)).await;
    let asked: BTreeSet<(String, String)> = server
        .store()
        .requests
        .iter()
        .map(|request| {
            let path = request.uri.split('?').next().unwrap().strip_prefix("/api/v1/").unwrap();
            let parts: Vec<&str> = path.split('/').collect();
            let verb = match (request.method.as_str(), &parts[..]) {
                ("GET", [_]) if request.uri.contains("watch=true") => "watch",
                ("GET", [_]) => "list",
                ("GET", [_, _]) => "get",
                ("PATCH", _) => "patch",
                other => panic!("{other:?}"),
            };
            let resource = match &parts[..] {
                [resource] | [resource, _] => (*resource).to_owned(),
                [resource, _, subresource] => format!("{resource}/{subresource}"),
                other => panic!("{other:?}"),
            };
            (resource, verb.to_owned())
        })
        .collect();
    let role = documents(&read("kube/loden.yml"));
    let rules = of_kind(&role, "ClusterRole").unwrap()["rules"].as_array().unwrap().clone();
    let strings = |value: &Value| -> Vec<String> {
        value.as_array().unwrap().iter().map(|item| item.as_str().unwrap().to_owned()).collect()
    };
    let allowed: BTreeSet<(String, String)> = rules
        .iter()
        .flat_map(|rule| {
            assert_eq!(strings(&rule["apiGroups"]), [""]);
            let verbs = strings(&rule["verbs"]);
            strings(&rule["resources"])
                .into_iter()
                .flat_map(move |resource| verbs.clone().into_iter().map(move |verb| (resource.clone(), verb)))
        })
        .collect();
    assert_eq!(asked, allowed);
}
