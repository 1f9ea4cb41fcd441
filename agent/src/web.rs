//! The web page (`--web-addr`): the node, its peers and what flows between them, drawn from the status document.
//!
//! For the node's own users: it listens on loopback only, and answers only requests that were meant for loopback, so
//! that no page of the Web can read it through a name that it points here (DNS rebinding).

use axum::{
    Router,
    extract::{Request as HttpRequest, State},
    http::{
        HeaderValue, StatusCode,
        header::{self, HOST},
    },
    middleware::{self, Next},
    response::{Html, IntoResponse, Response},
    routing::get,
};

use crate::control::{Asker, Request};

/// One file, with everything in it.
const PAGE: &str = include_str!("web/page.html");
/// Nothing from elsewhere: the page's own script and style, and its own status.
const POLICY: &str = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The routes `/` and `/status.json`.
pub fn routes(asker: Asker) -> Router {
    Router::new()
        .route("/", get(|| async { Html(PAGE) }))
        .route("/status.json", get(status))
        .with_state(asker)
        .layer(middleware::from_fn(guard))
}

async fn status(State(asker): State<Asker>) -> Response {
    match asker.ask(Request::Status).await {
        Ok(status) => axum::Json(status).into_response(),
        Err(error) => (StatusCode::SERVICE_UNAVAILABLE, format!("{error:#}\n")).into_response(),
    }
}

async fn guard(request: HttpRequest, next: Next) -> Response {
    let host = request.headers().get(HOST).and_then(|host| host.to_str().ok());
    if !host.is_some_and(is_loopback) {
        let answer = "this page is for the node's own address only: http://127.0.0.1 or http://localhost\n";
        return (StatusCode::FORBIDDEN, answer).into_response();
    }
    let mut response = next.run(request).await;
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-store"),
    ] {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

/// Whether a Host header names loopback, with or without a port.
fn is_loopback(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) && !name.is_empty() => name,
        _ => host,
    };
    let bare = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    bare.eq_ignore_ascii_case("localhost")
        || bare.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_counts_as_meant_for_us() {
        for host in
            ["127.0.0.1", "127.0.0.1:8080", "localhost:80", "LOCALHOST", "[::1]:80", "[::1]", "127.9.9.9:1"]
        {
            assert!(is_loopback(host), "{host}");
        }
        for host in [
            "",
            "evil.example",
            "evil.example:80",
            "127.0.0.1.evil.example",
            "192.0.2.1:80",
            "localhost.evil",
            ":80",
            "[::2]:80",
        ] {
            assert!(!is_loopback(host), "{host}");
        }
    }

    #[test]
    fn the_page_needs_nothing_from_elsewhere() {
        let urls: Vec<&str> =
            PAGE.match_indices("://").map(|(at, _)| &PAGE[at.saturating_sub(6)..at + 20]).collect();
        assert!(urls.iter().all(|url| url.contains("www.w3.org")), "{urls:?}");
        assert!(!PAGE.contains("src=") && !PAGE.contains("@import"));
    }
}
