use proptest::prelude::*;

use super::{request::Attachment, result::Attached, *};

fn env<'a>(pairs: &'a [(&'a str, &'a str)]) -> impl Fn(&str) -> Option<String> + 'a {
    move |name| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
}

const ADD: [(&str, &str); 5] = [
    ("CNI_COMMAND", "ADD"),
    ("CNI_CONTAINERID", "c1"),
    ("CNI_NETNS", "/nonexistent/netns"),
    ("CNI_IFNAME", "eth0"),
    ("CNI_PATH", "/nonexistent/bin"),
];

fn refused(pairs: &[(&str, &str)], input: &str) -> CniError {
    answer(&env(pairs), input.as_bytes()).unwrap_err()
}

#[test]
fn the_versions_are_told_whatever_is_asked() {
    let version = [("CNI_COMMAND", "VERSION")];
    for (input, speaks) in
        [("", NEWEST), (r#"{"cniVersion":"0.4.0"}"#, "0.4.0"), (r#"{"cniVersion":"9.9"}"#, NEWEST)]
    {
        let told = answer(&env(&version), input.as_bytes()).unwrap().unwrap();
        assert_eq!(told["cniVersion"], speaks, "{input}");
        assert_eq!(told["supportedVersions"], json!(["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]));
    }
}

#[test]
fn each_wrong_variable_is_named() {
    for (name, value, wanted) in [
        ("CNI_COMMAND", "JOIN", "CNI_COMMAND=\"JOIN\" must be ADD"),
        ("CNI_COMMAND", "", "CNI_COMMAND is missing"),
        ("CNI_CONTAINERID", "", "CNI_CONTAINERID is missing"),
        ("CNI_CONTAINERID", "../../etc", "CNI_CONTAINERID=\"../../etc\" must be letters"),
        ("CNI_NETNS", "", "CNI_NETNS is missing"),
        ("CNI_IFNAME", "a/b", "CNI_IFNAME=\"a/b\" must be an interface name"),
        ("CNI_IFNAME", "sixteen-bytes-xx", "CNI_IFNAME=\"sixteen-bytes-xx\" must be"),
        ("CNI_PATH", "", "CNI_PATH is missing"),
    ] {
        let pairs = ADD.map(|(key, old)| (key, if key == name { value } else { old }));
        let error = refused(&pairs, "{}");
        assert_eq!(error.code, code::BAD_ENVIRONMENT, "{error}");
        assert!(error.msg.starts_with(wanted), "{error}");
    }
}

#[test]
fn each_wrong_configuration_gets_the_specifications_code() {
    for (input, code, wanted) in [
        ("", code::DECODING, "the configuration on standard input is not JSON"),
        ("[1]", code::DECODING, "the configuration on standard input must be a JSON object, not \"[1]\""),
        (r#"{"cniVersion":"2.0.0"}"#, code::INCOMPATIBLE_VERSION, "cniVersion \"2.0.0\" is not supported"),
        (r#"{"cniVersion":"0.2.0"}"#, code::INCOMPATIBLE_VERSION, "cniVersion \"0.2.0\" is not supported"),
        (r#"{"cniVersion":1}"#, code::BAD_CONFIG, "\"cniVersion\": 1 must be a string"),
        (r#"{"cniVersion":"1.0.0"}"#, code::BAD_CONFIG, "\"name\" is missing"),
        (r#"{"name":"a b"}"#, code::BAD_CONFIG, "name=\"a b\" must be letters"),
        (r#"{"name":"n"}"#, code::BAD_CONFIG, "\"type\" is missing"),
        (
            r#"{"name":"n","type":"bridge"}"#,
            code::UNSUPPORTED_FIELD,
            "\"type\": \"bridge\" must be \"loden-cni\"",
        ),
        (
            r#"{"name":"n","type":"loden-cni","mtu":12}"#,
            code::BAD_CONFIG,
            "\"mtu\": 12 must be a number of bytes",
        ),
        (
            r#"{"name":"n","type":"loden-cni","subnetFile":"x"}"#,
            code::BAD_CONFIG,
            "\"subnetFile\": \"x\" must be an absolute path",
        ),
        (
            r#"{"name":"n","type":"loden-cni","runtimeConfig":{"mac":"01:00:00:00:00:01"}}"#,
            code::BAD_CONFIG,
            "\"runtimeConfig.mac\"",
        ),
        (
            r#"{"name":"n","type":"loden-cni","subnetFile":"/nonexistent/e"}"#,
            code::TRY_AGAIN,
            "\"subnetFile\": /nonexistent/e does not exist",
        ),
        (
            r#"{"name":"n","type":"flannel","subnetFile":"/nonexistent/e"}"#,
            code::TRY_AGAIN,
            "\"subnetFile\": /nonexistent/e does not exist",
        ),
    ] {
        let error = refused(&ADD, input);
        assert_eq!(error.code, code, "{input}: {error}");
        assert!(error.msg.starts_with(wanted), "{input}: {error}");
    }
}

#[test]
fn a_verb_that_a_version_does_not_have_is_refused() {
    let pairs = ADD.map(|(key, old)| (key, if key == "CNI_COMMAND" { "GC" } else { old }));
    let error = refused(&pairs, r#"{"cniVersion":"1.0.0","name":"n","type":"loden-cni"}"#);
    assert_eq!(error.msg, "cniVersion \"1.0.0\" has no GC");
}

#[test]
fn without_a_lease_nobody_can_be_attached() {
    let pairs = [("CNI_COMMAND", "STATUS"), ("CNI_PATH", "/nonexistent")];
    for kind in [flannel::TYPE, routed::TYPE] {
        let conf =
            format!(r#"{{"cniVersion":"1.1.0","name":"n","type":"{kind}","subnetFile":"/nonexistent/e"}}"#);
        let error = refused(&pairs, &conf);
        assert_eq!(error.code, code::NOT_AVAILABLE, "{error}");
        let object = error.to_json("1.1.0");
        assert_eq!((&object["cniVersion"], &object["code"]), (&json!("1.1.0"), &json!(50)));
        assert!(object["details"].as_str().unwrap().contains("the agent writes it"));
    }
}

/// Inputs that once were of interest, and those of other plugins.
const CORPUS: [&str; 12] = [
    "",
    "null",
    "{}",
    "{\"cniVersion\":\"1.1.0\",\"name\":\"n\",\"type\":\"loden-cni\"}",
    "{\"cniVersion\":\"0.3.1\",\"name\":\"cbr0\",\"type\":\"flannel\",\"delegate\":{\"hairpinMode\":true,\"isDefaultGateway\":true}}",
    "{\"name\":\"n\",\"type\":\"flannel\",\"delegate\":null,\"ipam\":null,\"runtimeConfig\":null}",
    "{\"name\":\"n\",\"type\":\"loden-cni\",\"prevResult\":{\"interfaces\":[{\"name\":\"eth0\",\"sandbox\":\"/x\"}]}}",
    "{\"name\":\"n\",\"type\":\"loden-cni\",\"prevResult\":{\"interfaces\":{},\"ips\":1,\"routes\":\"\"}}",
    "{\"name\":\"n\",\"type\":\"loden-cni\",\"ipam\":{\"type\":\"../../bin/sh\"}}",
    "{\"name\":\"n\",\"type\":\"loden-cni\",\"ipam\":{\"type\":7}}",
    "{\"name\":\"n\",\"type\":\"loden-cni\",\"NAME\":\"m\",\"mtu\":-1}",
    "{\"name\":\"\\u0000\",\"type\":\"loden-cni\",\"cni.dev/valid-attachments\":[{\"containerID\":1}]}",
];

/// Everything that reads a configuration and touches nothing: no input makes it panic, and every error has a code
/// and a message of one line.
fn survive(input: &[u8], verb: &str) {
    let pairs = ADD.map(|(key, old)| (key, if key == "CNI_COMMAND" { verb } else { old }));
    // There is no subnet.env, no namespace and no plugin by these names: nothing is made.
    if let Err(error) = answer(&env(&pairs), input) {
        assert!(error.code > 0 && !error.msg.is_empty() && !error.msg.contains('\n'), "{error:?}");
    }
    if let Ok(conf) = Conf::parse(input, Command::Add) {
        let attachment = Attachment { container: "c".into(), interface: "eth0".into() };
        if let Ok(Some(previous)) = conf.previous() {
            let _ = Attached::from_previous(previous, &attachment);
        }
        let _ = conf.valid_attachments();
    }
}

fn conf_text() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        "[ -~]{0,12}".prop_map(Value::from),
    ];
    let keys = prop::sample::select(vec![
        "ipam",
        "delegate",
        "prevResult",
        "interfaces",
        "ips",
        "routes",
        "dns",
        "mtu",
        "runtimeConfig",
        "bandwidth",
        "mac",
        "type",
        "ranges",
        "address",
        "interface",
        "cni.dev/valid-attachments",
        "dst",
    ]);
    let value = leaf.prop_recursive(4, 32, 5, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((keys.clone(), inner), 0..5)
                .prop_map(|pairs| Value::Object(pairs.into_iter().map(|(k, v)| (k.to_owned(), v)).collect())),
        ]
    });
    (value, prop::sample::select(vec!["loden-cni", "flannel"])).prop_map(|(value, kind)| {
        let mut conf = json!({ "cniVersion": "1.1.0", "name": "n", "subnetFile": "/nonexistent/e",
            "bpffsDir": "/nonexistent/bpf", "dataDir": "/nonexistent/data" });
        if let Value::Object(map) = value {
            for (key, value) in map {
                conf[key] = value;
            }
        }
        conf["type"] = kind.into();
        conf.to_string()
    })
}

const VERBS: [&str; 5] = ["ADD", "DEL", "CHECK", "GC", "STATUS"];

#[test]
fn the_corpus_is_survived() {
    for input in CORPUS {
        VERBS.iter().for_each(|verb| survive(input.as_bytes(), verb));
    }
}

proptest! {
    #[test]
    fn any_configuration_is_answered(text in conf_text(), verb in prop::sample::select(VERBS.to_vec())) {
        survive(text.as_bytes(), verb);
    }

    #[test]
    fn any_bytes_are_answered(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        survive(&bytes, "ADD");
    }

    #[test]
    fn a_configuration_with_bytes_changed_is_answered(which in 0..CORPUS.len(), at in any::<usize>(), byte in any::<u8>()) {
        let mut bytes = CORPUS[which].as_bytes().to_vec();
        if !bytes.is_empty() {
            let at = at % bytes.len();
            bytes[at] = byte;
        }
        survive(&bytes, "ADD");
    }
}
