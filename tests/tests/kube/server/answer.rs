//! What is answered to which request.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{Path, State},
    http::{HeaderMap, Method, StatusCode, Uri, header},
    response::{IntoResponse as _, Response},
    routing::{get, patch},
};
use serde_json::{Value, json};

use super::{
    patch::merge,
    store::{Fault, Request, Store},
    watch::{Watcher, Wish, gone, gone_event, partial, silence},
};

type Shared = Arc<Mutex<Store>>;
type Params = BTreeMap<String, String>;

pub(super) fn router(store: Shared) -> Router {
    Router::new()
        .route("/api/v1/nodes", get(nodes))
        .route("/api/v1/nodes/{name}", get(node))
        .route("/api/v1/nodes/{name}/status", patch(patch_status))
        .route("/api/v1/namespaces/{namespace}/pods/{name}", get(pod))
        .fallback(async || refuse(StatusCode::FORBIDDEN, "the agent's ClusterRole allows no such thing"))
        .with_state(store)
}

fn lock(store: &Shared) -> MutexGuard<'_, Store> {
    store.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A `Status` object, as every refusal is.
fn refuse(code: StatusCode, message: &str) -> Response {
    let reason = code.canonical_reason().unwrap_or_default().replace(' ', "");
    let status = json!({ "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code.as_u16() });
    (code, Json(status)).into_response()
}

/// Notes the request and says how it is refused, if it is.
async fn refused(
    store: &Shared,
    method: &Method,
    uri: &Uri,
    headers: &HeaderMap,
    body: &[u8],
) -> Option<Response> {
    let header = |name: header::HeaderName| {
        headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned()
    };
    let fault = {
        let mut store = lock(store);
        store.requests.push(Request {
            method: method.to_string(),
            uri: uri.to_string(),
            accept: header(header::ACCEPT),
            content_type: header(header::CONTENT_TYPE),
            body: String::from_utf8_lossy(body).into_owned(),
        });
        let bearer = store.token.as_ref().map(|token| format!("Bearer {token}"));
        if bearer.is_some_and(|bearer| header(header::AUTHORIZATION) != bearer) {
            return Some(refuse(StatusCode::UNAUTHORIZED, "Unauthorized"));
        }
        store.fault.clone()
    };
    let code = match fault {
        Some(Fault::Frozen) => match silence().await {},
        Some(Fault::Status(code)) => code,
        Some(Fault::Of(start, code)) if format!("{method} {uri}").starts_with(start) => code,
        _ => return None,
    };
    let code = StatusCode::from_u16(code).unwrap();
    let mut response = refuse(code, &format!("nodes is {code}: said the double"));
    if code == StatusCode::TOO_MANY_REQUESTS {
        response.headers_mut().insert(header::RETRY_AFTER, "1".parse().unwrap());
    }
    Some(response)
}

async fn nodes(State(store): State<Shared>, method: Method, uri: Uri, headers: HeaderMap) -> Response {
    if let Some(refused) = refused(&store, &method, &uri, &headers, b"").await {
        return refused;
    }
    let params: Params =
        form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes()).into_owned().collect();
    let accept = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let metadata_only = accept.contains("as=PartialObjectMetadata");
    let only = params.get("fieldSelector").map(|selector| {
        selector.strip_prefix("metadata.name=").expect("nodes are selected by name alone").to_owned()
    });
    if params.get("watch").is_some_and(|watch| watch == "true" || watch == "1") {
        let bookmarks = params.get("allowWatchBookmarks").is_some_and(|value| value == "true");
        let wish = Wish { only, metadata_only, bookmarks, slow: false };
        return watch(&store, &params, wish);
    }
    list(&store, &params, only.as_deref(), metadata_only)
}

fn list(store: &Shared, params: &Params, only: Option<&str>, metadata_only: bool) -> Response {
    let mut store = lock(store);
    let limit: usize = params.get("limit").map_or(usize::MAX, |limit| limit.parse().unwrap());
    let (version, from) = match params.get("continue") {
        None => (store.version, 0),
        Some(token) => {
            let (version, from) = token.split_once(':').unwrap();
            (version.parse().unwrap(), from.parse().unwrap())
        }
    };
    if from == 0 {
        let all = store.select(only);
        store.snapshots.insert(version, Arc::new(all));
    }
    let Some(all) = store.snapshots.get(&version).cloned() else {
        return (StatusCode::GONE, Json(gone())).into_response();
    };
    let page: Vec<Value> = all
        .iter()
        .skip(from)
        .take(limit)
        .map(|node| if metadata_only { partial(node) } else { node.as_ref().clone() })
        .collect();
    let to = from + page.len();
    let mut metadata = json!({ "resourceVersion": version.to_string() });
    if to < all.len() {
        metadata["continue"] = json!(format!("{version}:{to}"));
        metadata["remainingItemCount"] = json!(all.len() - to);
    }
    Json(json!({ "kind": "NodeList", "apiVersion": "v1", "metadata": metadata, "items": page }))
        .into_response()
}

fn watch(shared: &Shared, params: &Params, wish: Wish) -> Response {
    let mut store = lock(shared);
    let from: u64 = params
        .get("resourceVersion")
        .and_then(|version| version.parse().ok())
        .expect("a version to start from");
    let seconds: u64 = params.get("timeoutSeconds").map_or(1800, |seconds| seconds.parse().unwrap());
    if from > store.version {
        let message = format!("Too large resource version: {from}, current: {}", store.version);
        return refuse(StatusCode::GATEWAY_TIMEOUT, &message);
    }
    if from + 1 < store.oldest {
        return match store.fault {
            Some(Fault::GoneByStatus) => (StatusCode::GONE, Json(gone())).into_response(),
            _ => Body::from(format!("{}\n", gone_event())).into_response(),
        };
    }
    store.watchers_made += 1;
    let number = store.watchers_made;
    let (watcher, body) = Watcher::new(number, Wish { slow: store.fault == Some(Fault::Slow), ..wish });
    for change in store.history.iter().filter(|change| change.version > from) {
        watcher.tell(change);
    }
    store.watchers.push(watcher);
    let shared = Arc::clone(shared);
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_secs(seconds)).await;
        let mut store = lock(&shared);
        if store.fault != Some(Fault::Frozen) {
            store.watchers.retain(|watcher| watcher.number != number);
        }
    });
    ([(header::CONTENT_TYPE, "application/json;stream=watch")], body).into_response()
}

async fn node(
    State(store): State<Shared>,
    Path(name): Path<String>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
) -> Response {
    if let Some(refused) = refused(&store, &method, &uri, &headers, b"").await {
        return refused;
    }
    match lock(&store).node(&name) {
        Some(node) => Json(node).into_response(),
        None => refuse(StatusCode::NOT_FOUND, &format!("nodes {name:?} not found")),
    }
}

async fn pod(
    State(store): State<Shared>,
    Path((namespace, name)): Path<(String, String)>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
) -> Response {
    if let Some(refused) = refused(&store, &method, &uri, &headers, b"").await {
        return refused;
    }
    match lock(&store).pods.get(&format!("{namespace}/{name}")) {
        Some(pod) => Json(pod.clone()).into_response(),
        None => refuse(StatusCode::NOT_FOUND, &format!("pods {name:?} not found")),
    }
}

/// The status sub-resource: of a patch, only metadata and status count.
async fn patch_status(
    State(store): State<Shared>,
    Path(name): Path<String>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    if let Some(refused) = refused(&store, &method, &uri, &headers, &body).await {
        return refused;
    }
    let content_type =
        headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let strategic = match content_type {
        "application/strategic-merge-patch+json" => true,
        "application/merge-patch+json" => false,
        other => return refuse(StatusCode::UNSUPPORTED_MEDIA_TYPE, &format!("no patch of type {other:?}")),
    };
    let Ok(patch) = serde_json::from_slice::<Value>(&body) else {
        return refuse(StatusCode::BAD_REQUEST, "the patch is not JSON");
    };
    let mut store = lock(&store);
    let Some(before) = store.node(&name) else {
        return refuse(StatusCode::NOT_FOUND, &format!("nodes {name:?} not found"));
    };
    let mut node = before.clone();
    merge(&mut node, &patch, strategic);
    node["spec"] = before["spec"].clone();
    if node == before {
        // Nothing to write: the version stays, and nobody is told.
        return Json(node).into_response();
    }
    Json(store.write("MODIFIED", node).as_ref().clone()).into_response()
}
