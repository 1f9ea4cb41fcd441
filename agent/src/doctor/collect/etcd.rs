//! Asks etcd itself: each endpoint for its health and its clock, and any for the leases.

use std::{
    io,
    time::{Duration, Instant, SystemTime},
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use crate::{
    config::Secret,
    doctor::snapshot::{Etcd, Health},
    facts,
    registry::{EtcdOptions, Registry},
};

/// How long an endpoint may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long all of them may take together to list the leases.
const LISTING: Duration = Duration::from_secs(5);
/// More than an answer to a question about health is long.
const ANSWER_MAX: u64 = 1 << 16;

pub(super) async fn ask(etcd: &facts::Etcd, password: Option<&Secret>) -> Etcd {
    if etcd.endpoints.is_empty() {
        return Etcd::default();
    }
    let health = etcd.endpoints.iter().map(|url| async {
        let answer = timeout(PATIENCE, health(url)).await;
        let answer = answer.unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::TimedOut)));
        (url.clone(), answer.map_err(|error| error.to_string()))
    });
    let endpoints = futures::future::join_all(health).await;
    let leases = match timeout(LISTING, leases(etcd, password)).await {
        Ok(leases) => leases.map_err(|error| error.to_string()),
        Err(_) => Err(format!("no answer within {} s", LISTING.as_secs())),
    };
    Etcd { endpoints, leases: Some(leases) }
}

/// `GET /health`; where etcd speaks TLS, only the connection is tried.
async fn health(url: &str) -> io::Result<Health> {
    let (scheme, authority) = url.split_once("://").unwrap_or(("http", url));
    let start = Instant::now();
    let mut stream = TcpStream::connect(authority).await?;
    if scheme == "https" {
        return Ok(Health { healthy: None, took: start.elapsed(), ahead: None });
    }
    let request = format!("GET /health HTTP/1.0\r\nHost: {authority}\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.take(ANSWER_MAX).read_to_string(&mut answer).await?;
    let took = start.elapsed();
    Ok(Health { healthy: Some(is_healthy(&answer)), took, ahead: ahead(&answer, SystemTime::now()) })
}

fn is_healthy(answer: &str) -> bool {
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    // etcd 3 says "true" as a string, older ones as a boolean.
    let health = serde_json::from_str::<serde_json::Value>(body).unwrap_or_default();
    health["health"] == "true" || health["health"] == true
}

/// How far the answer's `Date` is ahead of `now`, in seconds.
fn ahead(answer: &str, now: SystemTime) -> Option<i64> {
    let date = answer.lines().take_while(|line| !line.is_empty()).find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("date").then(|| httpdate::parse_http_date(value.trim()).ok())?
    })?;
    let seconds = |duration: Duration| i64::try_from(duration.as_secs()).unwrap_or(i64::MAX);
    Some(match date.duration_since(now) {
        Ok(ahead) => seconds(ahead),
        Err(behind) => -seconds(behind.duration()),
    })
}

async fn leases(
    etcd: &facts::Etcd,
    password: Option<&Secret>,
) -> Result<Vec<crate::lease::Lease>, crate::registry::RegistryError> {
    let registry = Registry::connect(EtcdOptions {
        endpoints: etcd.endpoints.clone(),
        prefix: etcd.prefix.clone(),
        ca_file: etcd.ca_file.clone(),
        cert_file: etcd.cert_file.clone(),
        key_file: etcd.key_file.clone(),
        username: etcd.username.clone().filter(|_| password.is_some()),
        password: password.map(|password| password.expose().to_owned()),
    })
    .await?;
    registry.leases().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn health_and_clock_are_read_from_the_answer() {
        let answer = "HTTP/1.0 200 OK\r\nDate: Mon, 23 Nov 2026 17:00:00 GMT\r\n\r\n{\"health\":\"true\"}";
        assert!(
            is_healthy(answer)
                && !is_healthy("HTTP/1.0 503 x\r\n\r\n{\"health\":\"false\"}")
                && !is_healthy("")
        );
        let at = |text: &str| httpdate::parse_http_date(text).unwrap();
        assert_eq!(ahead(answer, at("Mon, 23 Nov 2026 16:59:00 GMT")), Some(60));
        assert_eq!(ahead(answer, at("Mon, 23 Nov 2026 17:01:30 GMT")), Some(-90));
        assert_eq!(
            ahead("HTTP/1.0 200 OK\r\n\r\nDate: Mon, 23 Nov 2026 17:00:00 GMT", SystemTime::now()),
            None
        );
    }
}
