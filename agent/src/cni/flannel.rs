//! flannel's plugin: fills a configuration from `subnet.env` and hands it to another plugin, by default the bridge.
//!
//! As flannel-io/cni-plugin does it, field by field, with its state directory: containers that its plugin attached
//! are detached by this one, and the other way round. What it leaves out is done besides: CHECK, GC and STATUS are
//! passed on, and the state of a container whose DEL failed is kept for the next DEL.

use std::{
    fs::{self, DirBuilder, OpenOptions},
    io::{ErrorKind, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use serde_json::{Map, Value, json};

use super::{
    delegate::Delegate,
    error::{CniError, Result, code},
    lease::Lease,
    request::{Attachment, Command, Conf, Environment, bad_field},
};

/// The name by which flannel's configuration asks for this.
pub const TYPE: &str = "flannel";
const SUBNET_FILE: &str = "/run/flannel/subnet.env";
const DATA_DIR: &str = "/var/lib/cni/flannel";

/// Does what the runtime asks; the answer is what goes to standard output.
///
/// # Errors
///
/// Those of the configuration, of `subnet.env` and of the plugin that it is handed to.
pub fn run(env: &Environment, conf: &Conf) -> Result<Option<Value>> {
    match env.command {
        Command::Add => add(env, conf),
        Command::Del => delete(env, conf).map(|()| None),
        Command::Check => check(env, conf).map(|()| None),
        Command::Gc | Command::Status => {
            let lease = Lease::read(&subnet_file(conf)?)?;
            let (kind, rendered) = render(conf, &lease)?;
            let delegate = Delegate::find(env, "delegate.type", &kind)?;
            let mut rendered = rendered;
            if env.command == Command::Gc {
                conf.valid_attachments()?;
                for (key, value) in conf.raw.iter().filter(|(key, _)| key.starts_with("cni.dev/")) {
                    rendered.insert(key.clone(), value.clone());
                }
            }
            delegate.call_if_modern(env.command, &Value::Object(rendered)).map(|()| None)
        }
        Command::Version => Ok(None),
    }
}

fn subnet_file(conf: &Conf) -> Result<PathBuf> {
    conf.path("subnetFile", SUBNET_FILE)
}

fn add(env: &Environment, conf: &Conf) -> Result<Option<Value>> {
    let lease = Lease::read(&subnet_file(conf)?)?;
    let (kind, rendered) = render(conf, &lease)?;
    let delegate = Delegate::find(env, "delegate.type", &kind)?;
    let rendered = Value::Object(rendered);
    save(&state_file(env, conf)?, &rendered)?;
    delegate.call(Command::Add, &rendered)
}

/// The plugin's name, and its configuration.
fn render(conf: &Conf, lease: &Lease) -> Result<(String, Map<String, Value>)> {
    let mut delegate = conf.object("delegate")?.cloned().unwrap_or_default();
    for key in ["name", "ipam"] {
        if let Some(value) = delegate.get(key) {
            return Err(bad_field(
                format_args!("delegate.{key}"),
                value,
                "must not be there: it is set here",
            ));
        }
    }
    let kind = match delegate.get("type") {
        None => "bridge".to_owned(),
        Some(Value::String(kind)) => kind.clone(),
        Some(other) => return Err(bad_field("delegate.type", other, "must be a string")),
    };
    if kind == TYPE {
        return Err(bad_field("delegate.type", &kind.as_str().into(), "would call itself for ever"));
    }
    let mut default = |key: &str, value: Value| {
        delegate.entry(key).or_insert(value);
    };
    default("type", kind.as_str().into());
    // Somebody must, and one is enough.
    default("ipMasq", (!lease.ip_masq).into());
    default("mtu", lease.mtu.into());
    if kind == "bridge" {
        default("isGateway", true.into());
    }
    delegate.insert("name".into(), conf.name.as_str().into());
    if let Some(runtime) = conf.object("runtimeConfig")? {
        delegate.insert("runtimeConfig".into(), Value::Object(runtime.clone()));
    }
    if let Some(version) = conf.string("cniVersion")? {
        delegate.insert("cniVersion".into(), version.into());
    }
    delegate.insert("ipam".into(), ipam(conf, lease)?);
    Ok((kind, delegate))
}

/// The addresses: those of the subnet, by host-local unless another plugin is named; routes to all of the network.
fn ipam(conf: &Conf, lease: &Lease) -> Result<Value> {
    let mut ipam = conf.object("ipam")?.cloned().unwrap_or_default();
    ipam.entry("type").or_insert_with(|| "host-local".into());
    let ranges = lease.subnets().map(|subnet| json!([{ "subnet": subnet.to_string() }]));
    ipam.insert("ranges".into(), ranges.collect());
    let mut routes = match ipam.get("routes") {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Array(routes)) => routes.clone(),
        Some(other) => return Err(bad_field("ipam.routes", other, "must be a list of routes")),
    };
    if let Some(wrong) = routes.iter().find(|route| !route["dst"].is_string()) {
        return Err(bad_field("ipam.routes", wrong, "must be an object with a dst"));
    }
    routes.extend(lease.networks.iter().map(|network| json!({ "dst": network.to_string() })));
    ipam.insert("routes".into(), routes.into());
    Ok(Value::Object(ipam))
}

fn state_file(env: &Environment, conf: &Conf) -> Result<PathBuf> {
    let container = env.attachment.as_ref().map(|attachment: &Attachment| attachment.container.as_str());
    Ok(conf.path("dataDir", DATA_DIR)?.join(container.unwrap_or_default()))
}

fn save(file: &Path, rendered: &Value) -> Result<()> {
    let failed = |error: std::io::Error| {
        CniError::new(code::IO, format_args!("\"dataDir\": {} cannot be written: {error}", file.display()))
    };
    if let Some(directory) = file.parent() {
        DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed)?;
    }
    let mut options = OpenOptions::new();
    let mut opened =
        options.write(true).create(true).truncate(true).mode(0o600).open(file).map_err(failed)?;
    opened.write_all(rendered.to_string().as_bytes()).map_err(failed)
}

/// What the container was attached with; `None` where nothing is known of it.
fn saved(file: &Path) -> Result<Option<Value>> {
    match fs::read(file) {
        Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes).unwrap_or(Value::Null))),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(CniError::new(code::IO, format_args!("\"dataDir\": {}: {error}", file.display()))),
    }
}

fn delete(env: &Environment, conf: &Conf) -> Result<()> {
    let file = state_file(env, conf)?;
    // Nothing known is nothing to do, as the specification wants it of DEL.
    let Some(rendered) = saved(&file)? else { return Ok(()) };
    let Some(kind) = rendered["type"].as_str() else {
        eprintln!("loden-cni: {} is not a configuration and is left alone", file.display());
        return Ok(());
    };
    Delegate::find(env, "type", kind)?.call(Command::Del, &rendered)?;
    match fs::remove_file(&file) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(CniError::new(code::IO, format_args!("\"dataDir\": {}: {error}", file.display())))
        }
        _ => Ok(()),
    }
}

fn check(env: &Environment, conf: &Conf) -> Result<()> {
    let file = state_file(env, conf)?;
    let Some(mut rendered) = saved(&file)? else {
        return Err(CniError::new(
            code::UNKNOWN_CONTAINER,
            format_args!("the container was not attached by this plugin: there is no {}", file.display()),
        ));
    };
    let kind = rendered["type"].as_str().unwrap_or_default().to_owned();
    if let Some(previous) = conf.previous()? {
        rendered["prevResult"] = Value::Object(previous.clone());
    }
    Delegate::find(env, "type", &kind)?.call(Command::Check, &rendered).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease() -> Lease {
        Lease {
            file: SUBNET_FILE.into(),
            networks: vec!["10.244.0.0/16".parse().unwrap()],
            subnet: Some("10.244.1.0/24".parse().unwrap()),
            subnet6: None,
            mtu: 1450,
            ip_masq: true,
        }
    }

    fn rendered(conf: &str, lease: &Lease) -> Result<Value> {
        let conf = Conf::parse(conf.as_bytes(), Command::Add)?;
        render(&conf, lease).map(|(_, rendered)| Value::Object(rendered))
    }

    const STOCK: &str = r#"{"cniVersion":"0.3.1","name":"cbr0","type":"flannel","delegate":{"hairpinMode":true,"isDefaultGateway":true}}"#;

    #[test]
    fn the_stock_configuration_becomes_what_flannel_makes_of_it() {
        let expected = json!({
            "cniVersion": "0.3.1", "hairpinMode": true, "ipMasq": false,
            "ipam": { "ranges": [[{ "subnet": "10.244.1.0/24" }]], "routes": [{ "dst": "10.244.0.0/16" }], "type": "host-local" },
            "isDefaultGateway": true, "isGateway": true, "mtu": 1450, "name": "cbr0", "type": "bridge"
        });
        assert_eq!(rendered(STOCK, &lease()).unwrap(), expected);
    }

    #[test]
    fn what_is_given_wins_over_what_is_filled_in() {
        let conf = r#"{"cniVersion":"0.4.0","name":"n","type":"flannel","ipam":{"type":"whereabouts","routes":[{"dst":"0.0.0.0/0"}]},
            "runtimeConfig":{"portMappings":[]},"delegate":{"type":"ptp","ipMasq":true,"mtu":1400}}"#;
        let lease = Lease { subnet6: Some("fc00:0:0:1::/64".parse().unwrap()), ..lease() };
        let rendered = rendered(conf, &lease).unwrap();
        assert_eq!((&rendered["ipMasq"], &rendered["mtu"]), (&json!(true), &json!(1400)));
        assert_eq!(rendered.get("isGateway"), None, "only a bridge has that");
        assert_eq!(rendered["runtimeConfig"], json!({ "portMappings": [] }));
        let ranges = json!([[{ "subnet": "10.244.1.0/24" }], [{ "subnet": "fc00:0:0:1::/64" }]]);
        let routes = json!([{ "dst": "0.0.0.0/0" }, { "dst": "10.244.0.0/16" }]);
        assert_eq!(rendered["ipam"], json!({ "type": "whereabouts", "routes": routes, "ranges": ranges }));
    }

    #[test]
    fn keys_are_read_in_any_case_and_masquerading_is_done_by_one() {
        let conf = r#"{"NAME":"n","Type":"flannel","Delegate":{}}"#;
        let rendered = rendered(conf, &Lease { ip_masq: false, ..lease() }).unwrap();
        assert_eq!(rendered["ipMasq"], true);
        assert_eq!(rendered.get("cniVersion"), None);
    }

    #[test]
    fn what_is_filled_in_here_may_not_be_given() {
        let error = |delegate: &str| {
            let conf = format!(r#"{{"name":"n","type":"flannel","delegate":{delegate}}}"#);
            rendered(&conf, &lease()).unwrap_err().msg
        };
        assert_eq!(error(r#"{"name":"x"}"#), r#""delegate.name": "x" must not be there: it is set here"#);
        assert!(error(r#"{"ipam":{}}"#).starts_with(r#""delegate.ipam": {} must not"#));
        assert_eq!(error(r#"{"type":7}"#), r#""delegate.type": 7 must be a string"#);
        assert_eq!(
            error(r#"{"type":"flannel"}"#),
            r#""delegate.type": "flannel" would call itself for ever"#
        );
        assert_eq!(error("[]"), r#""delegate": [] must be an object"#);
    }
}
