//! One of etcd's addresses, checked before it is used.

use super::RegistryError;

/// `http://HOST:PORT` or `https://HOST:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Endpoint {
    url: String,
    tls: bool,
}

impl Endpoint {
    /// Reads all of them; blanks around them and slashes behind them do not count.
    pub(super) fn parse_all(endpoints: &[String]) -> Result<Vec<Self>, RegistryError> {
        let given = endpoints.iter().map(|endpoint| endpoint.trim()).filter(|endpoint| !endpoint.is_empty());
        let parsed: Vec<_> = given.map(Self::parse).collect::<Result<_, _>>()?;
        if parsed.is_empty() {
            return Err(RegistryError::Options("no endpoint is given, such as http://127.0.0.1:2379".into()));
        }
        Ok(parsed)
    }

    fn parse(text: &str) -> Result<Self, RegistryError> {
        let refuse = |reason| {
            RegistryError::Options(format!(
                "endpoint {text:?} {reason}: it must look like http://10.0.0.1:2379 or https://etcd.example:2379"
            ))
        };
        let (scheme, rest) = text.split_once("://").unwrap_or(("http", text));
        let tls = match scheme.to_ascii_lowercase().as_str() {
            "http" => false,
            "https" => true,
            _ => return Err(refuse("is neither http nor https")),
        };
        let address = rest.trim_end_matches('/');
        if address.contains(['/', '@', '?', '#', ' ']) {
            return Err(refuse("has more than a host and a port"));
        }
        let (host, port) = address.rsplit_once(':').ok_or_else(|| refuse("has no port"))?;
        if host.is_empty() || (host.contains(':') && !(host.starts_with('[') && host.ends_with(']'))) {
            return Err(refuse("has no host"));
        }
        match port.parse::<u16>() {
            Ok(1..) => Ok(Self { url: format!("{}://{address}", if tls { "https" } else { "http" }), tls }),
            _ => Err(refuse("has no port of 1 to 65535")),
        }
    }

    pub(super) fn url(&self) -> &str {
        &self.url
    }

    pub(super) fn tls(&self) -> bool {
        self.tls
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_read_with_blanks_slashes_and_without_a_scheme() {
        let given =
            [" http://10.0.0.1:2379/ ", "", "HTTPS://etcd:4001", "10.0.0.2:2379", "http://[::1]:2379"];
        let parsed = Endpoint::parse_all(&given.map(str::to_owned)).unwrap();
        let urls: Vec<_> = parsed.iter().map(Endpoint::url).collect();
        assert_eq!(
            urls,
            ["http://10.0.0.1:2379", "https://etcd:4001", "http://10.0.0.2:2379", "http://[::1]:2379"]
        );
        assert_eq!(parsed.iter().map(Endpoint::tls).collect::<Vec<_>>(), [false, true, false, false]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (given, says) in [
            (",", "no host"),
            ("unix:///run/etcd.sock", "neither http nor https"),
            ("http://10.0.0.1", "no port"),
            ("http://10.0.0.1:0", "no port of 1 to 65535"),
            ("http://10.0.0.1:99999", "no port of 1 to 65535"),
            ("http://:2379", "no host"),
            ("http://::1:2379", "no host"),
            ("http://user:word@10.0.0.1:2379", "more than a host and a port"),
            ("http://10.0.0.1:2379/v2", "more than a host and a port"),
        ] {
            let error = Endpoint::parse_all(&[given.to_owned()]).map(|_| ()).unwrap_err().to_string();
            assert!(error.contains(says) || given == ",", "{given}: {error}");
        }
        assert!(Endpoint::parse_all(&[]).unwrap_err().to_string().contains("no endpoint is given"));
    }
}
