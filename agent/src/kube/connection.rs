//! The requests that are made of the Kubernetes API, one function each.

use std::{
    error::Error as _,
    future::Future,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::Stream;
use kube_client::{
    Client, Config, Error,
    client::AuthError,
    config::{KubeConfigOptions, Kubeconfig, KubeconfigError},
    core::{
        Request, WatchEvent,
        params::{GetParams, ListParams, Patch, PatchParams, WatchParams},
        response::Status,
    },
};
use rand::Rng as _;
use secrecy::ExposeSecret as _;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{
    Annotations, KubeError, KubeOptions,
    node::{Node, Page},
};

const NODES: &str = "/api/v1/nodes";
/// How long a connection may take to be made.
const CONNECT: Duration = Duration::from_secs(5);
/// After so many requests in a row that nobody answered, the credentials are read again: a server that does not take our
/// certificate any more only hangs up.
const DOUBT: u32 = 3;

/// The part of the Kubernetes API that is about nodes. Clones share their connections.
#[derive(Clone)]
pub struct Api {
    at_hand: Arc<Mutex<AtHand>>,
    pub(super) url: String,
    pub(super) options: KubeOptions,
    pub(super) annotations: Annotations,
}

/// The client in use. It keeps what it was made of: a kubeconfig may have got another token or certificate since.
struct AtHand {
    client: Client,
    /// Requests in a row that nobody answered.
    unanswered: u32,
    /// The credentials are to be read again before the next request.
    doubted: bool,
}

/// What the watch tells.
pub(super) type Event = WatchEvent<Node>;

impl Api {
    /// Reads kubeconfig, or the pod's own credentials. Does not ask the API anything: that it is away is no reason not
    /// to start.
    ///
    /// # Errors
    ///
    /// [`KubeError::Options`], naming what is missing.
    pub async fn connect(options: KubeOptions) -> Result<Self, KubeError> {
        let (client, url) = client(&options).await?;
        let annotations = Annotations::new(&options.config.annotation_prefix);
        let at_hand = Arc::new(Mutex::new(AtHand { client, unanswered: 0, doubted: false }));
        Ok(Self { at_hand, url, options, annotations })
    }

    fn at_hand(&self) -> MutexGuard<'_, AtHand> {
        self.at_hand.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The client at hand, or a new one where its credentials are in doubt and can be read again.
    async fn client(&self) -> Client {
        if std::mem::take(&mut self.at_hand().doubted) {
            match client(&self.options).await {
                Ok((client, _)) => self.at_hand().client = client,
                Err(error) => tracing::warn!("{error}; the credentials that were read before stay in use"),
            }
        }
        self.at_hand().client.clone()
    }

    /// Notes how a request has ended.
    fn learn<T>(&self, answer: &Result<T, KubeError>) {
        let mut at_hand = self.at_hand();
        at_hand.unanswered = match answer {
            Err(KubeError::Unreachable { .. }) => at_hand.unanswered + 1,
            _ => 0,
        };
        if at_hand.unanswered == DOUBT || matches!(answer, Err(KubeError::Denied { .. })) {
            (at_hand.unanswered, at_hand.doubted) = (0, true);
        }
    }

    /// The name of the node that this agent runs on: `NODE_NAME`, or that of the pod `POD_NAMESPACE`/`POD_NAME`.
    ///
    /// # Errors
    ///
    /// Where neither is set, and where the API does not tell of the pod.
    pub async fn node_name(&self, env: &dyn Fn(&str) -> Option<String>) -> Result<String, KubeError> {
        let env = |name| env(name).filter(|value| !value.is_empty());
        if let Some(name) = env("NODE_NAME") {
            return object_name("NODE_NAME", name);
        }
        let (Some(namespace), Some(pod)) = (env("POD_NAMESPACE"), env("POD_NAME")) else {
            return Err(KubeError::Options(
                "NODE_NAME must be set to this node's name, or POD_NAME and POD_NAMESPACE to this pod's"
                    .into(),
            ));
        };
        let namespace = object_name("POD_NAMESPACE", namespace)?;
        let pod = object_name("POD_NAME", pod)?;
        let what = "get this pod, which tells the node's name (set NODE_NAME to do without)";
        let pods = Request::new(format!("/api/v1/namespaces/{namespace}/pods"));
        let found: Value = self.ask(what, pods.get(&pod, &GetParams::default())).await?;
        match found["spec"]["nodeName"].as_str() {
            Some(name) if !name.is_empty() => Ok(name.to_owned()),
            _ => Err(KubeError::Options(format!(
                "the pod {namespace}/{pod} has no spec.nodeName; set NODE_NAME"
            ))),
        }
    }

    /// One node, whole.
    pub(super) async fn node(&self, name: &str) -> Result<Node, KubeError> {
        let request = Request::new(NODES).get(name, &GetParams::default());
        match self.ask("get a node", request).await {
            Err(KubeError::Refused { code: 404, .. }) => Err(KubeError::NoNode(name.to_owned())),
            answer => answer.map(|node| self.cut(node)),
        }
    }

    /// All nodes, or the only one that matters, each given to `take` as it comes; the version that they are of.
    pub(super) async fn list(
        &self,
        only: Option<&str>,
        mut take: impl FnMut(Node),
    ) -> Result<String, KubeError> {
        let mut params = ListParams { limit: Some(self.options.page), ..ListParams::default() };
        params.field_selector = only.map(selector);
        loop {
            let page: Page = self.ask("list the nodes", Request::new(NODES).list(&params)).await?;
            page.items.into_iter().for_each(|node| take(self.cut(node)));
            match page.metadata.more.filter(|more| !more.is_empty()) {
                None => return Ok(page.metadata.resource_version),
                more => params.continue_token = more,
            }
        }
    }

    /// What happens to the nodes' metadata after a version. The server ends it after the second value.
    pub(super) async fn watch(
        &self,
        only: Option<&str>,
        version: &str,
    ) -> Result<(impl Stream<Item = Result<Event, Error>> + use<>, Duration), KubeError> {
        let least = self.options.watch.as_secs().max(1);
        let seconds = rand::rng().random_range(least..=least * 2);
        let params = WatchParams {
            timeout: u32::try_from(seconds).ok(),
            field_selector: only.map(selector),
            bookmarks: true,
            ..WatchParams::default()
        };
        let what = "watch the nodes";
        let request =
            Request::new(NODES).watch_metadata(&params, version).map_err(|error| unmade(what, &error))?;
        let client = self.client().await;
        let stream = self.within(what, client.request_events::<Node>(request)).await?;
        Ok((stream, Duration::from_secs(seconds)))
    }

    /// Changes annotations or conditions of a node, and returns the node as it then is.
    pub(super) async fn patch(
        &self,
        what: &'static str,
        name: &str,
        patch: &Value,
    ) -> Result<Node, KubeError> {
        let patch = Patch::Strategic(patch);
        let request = Request::new(NODES).patch_subresource("status", name, &PatchParams::default(), &patch);
        match self.ask(what, request).await {
            Err(KubeError::Refused { code: 404, .. }) => Err(KubeError::NoNode(name.to_owned())),
            answer => answer.map(|node| self.cut(node)),
        }
    }

    pub(super) fn cut(&self, mut node: Node) -> Node {
        self.annotations.keep_ours(&mut node.metadata.annotations);
        node
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        what: &'static str,
        request: Result<http::Request<Vec<u8>>, kube_client::core::request::Error>,
    ) -> Result<T, KubeError> {
        let request = request.map_err(|error| unmade(what, &error))?;
        let client = self.client().await;
        let text = self.within(what, client.request_text(request)).await?;
        serde_json::from_str(&text).map_err(|error| KubeError::Unreachable {
            what,
            reason: format!("the answer is not what it should be: {error}"),
        })
    }

    async fn within<T>(
        &self,
        what: &'static str,
        answer: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, KubeError> {
        let answer = match tokio::time::timeout(self.options.limit, pin!(answer)).await {
            Ok(answer) => answer.map_err(|error| failed(what, &error)),
            Err(_) => Err(KubeError::Unreachable {
                what,
                reason: format!("no answer within {:?}", self.options.limit),
            }),
        };
        self.learn(&answer);
        answer
    }
}

/// A client by what the options name now, and the URL of the API.
async fn client(options: &KubeOptions) -> Result<(Client, String), KubeError> {
    let mut config = client_config(options).await?;
    // A refusal is told of and tried again by the keeper, which knows what can wait.
    config.default_retry = false;
    config.connect_timeout = Some(CONNECT);
    let url = config.cluster_url.to_string();
    let client = Client::try_from(config)
        .map_err(|error| KubeError::Options(format!("the credentials cannot be used: {}", chain(&error))))?;
    Ok((client, url))
}

/// As client-go's `BuildConfigFromFlags`.
async fn client_config(options: &KubeOptions) -> Result<Config, KubeError> {
    let url = |text: &String| {
        text.parse().map_err(|error| KubeError::Options(format!("--kube-api-url={text}: {error}")))
    };
    match (&options.config.kubeconfig, &options.config.api_url) {
        (Some(path), api_url) => {
            let wrong = |error: &(dyn std::error::Error + 'static)| {
                KubeError::Options(format!("--kubeconfig-file={}: {}", path.display(), chain(error)))
            };
            let file = Kubeconfig::read_from(path).map_err(|error| wrong(&error))?;
            let mut config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default())
                .await
                .map_err(|error| wrong(&error))?;
            if let Some(text) = api_url {
                config.cluster_url = url(text)?;
            }
            // The client takes any token for one that HTTP can carry.
            let token = config.auth_info.token.as_ref().map(|token| token.expose_secret());
            if token.is_some_and(|token| http::HeaderValue::from_str(token).is_err()) {
                return Err(KubeError::Options(format!(
                    "--kubeconfig-file={}: the user's token must be of printable ASCII characters, without a line break",
                    path.display()
                )));
            }
            // It is shown wherever the API is named.
            if config.cluster_url.authority().is_some_and(|authority| authority.as_str().contains('@')) {
                return Err(KubeError::Options(format!(
                    "--kubeconfig-file={}: the server's URL must be without user and password; these belong to an entry of users",
                    path.display()
                )));
            }
            Ok(config)
        }
        (None, Some(text)) => Ok(Config::new(url(text)?)),
        (None, None) => Config::incluster().map_err(|error| {
            KubeError::Options(format!(
                "this is no pod with a service account ({}); where the agent is none, give --kubeconfig-file",
                chain(&error)
            ))
        }),
    }
}

/// A name as Kubernetes has them (RFC 1123 subdomain): it becomes part of a path.
fn object_name(variable: &str, name: String) -> Result<String, KubeError> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.');
    if name.len() <= 253 && name.chars().all(plain) && name.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        return Ok(name);
    }
    let name: String = name.chars().take(253).collect();
    Err(KubeError::Options(format!(
        "{variable}={name:?} must be a name of lower-case letters, digits, hyphens and dots, as kubectl shows it"
    )))
}

fn selector(name: &str) -> String {
    format!("metadata.name={name}")
}

fn unmade(what: &'static str, error: &(dyn std::error::Error + 'static)) -> KubeError {
    KubeError::Unreachable { what, reason: chain(error) }
}

/// What a failed request means.
pub(super) fn failed(what: &'static str, error: &Error) -> KubeError {
    match error {
        Error::Api(status) => refused(what, status),
        // Its own text says no more than of which library the error is.
        other => KubeError::Unreachable { what, reason: other.source().map_or_else(|| chain(other), chain) },
    }
}

/// What a refusal means.
pub(super) fn refused(what: &'static str, status: &Status) -> KubeError {
    let reason = match (&status.message, &status.reason) {
        (message, reason) if message.is_empty() => reason.clone(),
        (message, _) => message.clone(),
    };
    let reason: String = reason.chars().take(500).map(|c| if c.is_control() { ' ' } else { c }).collect();
    match status.code {
        401 | 403 => KubeError::Denied { what, reason },
        code => KubeError::Refused { what, code, reason },
    }
}

/// The error and what is behind it, each part once; what could repeat a credential is said in words of our own.
pub(super) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let parts = || std::iter::successors(Some(error), |error| (*error).source());
    if let Some(text) = parts().find_map(guarded) {
        return text;
    }
    let mut text = error.to_string();
    for part in parts().skip(1).map(ToString::to_string) {
        if !text.contains(&part) {
            text = format!("{text}: {part}");
        }
    }
    text
}

/// For an error whose own text holds what was read, and so maybe a token, a key or a password.
fn guarded(error: &(dyn std::error::Error + 'static)) -> Option<String> {
    if let Some(KubeconfigError::Parse(error)) = error.downcast_ref() {
        let line = error.location().map(|at| format!(" at line {}", at.line())).unwrap_or_default();
        return Some(format!("it is not a kubeconfig{line}, which may hold a secret and is not repeated"));
    }
    match error.downcast_ref() {
        Some(AuthError::AuthExecRun { out, .. }) => {
            return Some(format!("the command that should print credentials ended with {}", out.status));
        }
        Some(AuthError::AuthExecParse(_)) => {
            return Some("what the command printed is not an ExecCredential, and is not repeated".into());
        }
        _ => {}
    }
    match error.downcast_ref() {
        Some(Error::ProxyProtocolUnsupported { .. } | Error::ProxyProtocolDisabled { .. }) => {
            Some("a proxy-url cannot be used: the API must be reached without a proxy".into())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_would_change_the_path_is_refused() {
        for name in ["n1", "ip-10-0-0-1.eu.compute.internal", "0"] {
            assert_eq!(object_name("NODE_NAME", name.into()).unwrap(), name);
        }
        for name in ["", "N1", "a/b", "..", "a?b", "a b", "-a", &"a".repeat(254)] {
            let error = object_name("NODE_NAME", name.into()).unwrap_err().to_string();
            assert!(error.contains("NODE_NAME="), "{error}");
        }
    }

    #[test]
    fn a_denial_says_what_to_grant() {
        let status = Status { code: 403, message: "nodes is forbidden\n".into(), ..Status::default() };
        let text = refused("list the nodes", &status).to_string();
        assert!(
            text.contains("may not list the nodes: nodes is forbidden ;") && text.contains("ClusterRole"),
            "{text}"
        );
    }
}
