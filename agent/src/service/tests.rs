use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

use tempfile::TempDir;

use super::*;

const PID: u32 = 4711;

fn found(variables: &[(&str, &str)]) -> ServiceManager {
    let variables: BTreeMap<&str, &str> = variables.iter().copied().collect();
    ServiceManager::find(&|name| variables.get(name).map(|value| (*value).to_owned()), PID)
}

/// A service manager's socket, and its name for `NOTIFY_SOCKET`.
fn manager() -> (TempDir, UnixDatagram, String) {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    (directory, socket, path.to_str().unwrap().to_owned())
}

fn told(socket: &UnixDatagram) -> String {
    let mut buffer = [0; 256];
    let length = socket.recv(&mut buffer).unwrap();
    String::from_utf8(buffer[..length].to_vec()).unwrap()
}

#[test]
fn the_manager_is_told_what_happens() {
    let (_directory, socket, name) = manager();
    let service = found(&[("NOTIFY_SOCKET", &name)]);
    service.ready();
    service.status("3 peers\nREADY=0");
    service.stopping();
    assert_eq!(
        [told(&socket), told(&socket), told(&socket)],
        ["READY=1", "STATUS=3 peers READY=0", "STOPPING=1"]
    );
}

#[test]
fn an_abstract_socket_is_reached() {
    let name = format!("loden-test-{}", std::process::id());
    let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    found(&[("NOTIFY_SOCKET", &format!("@{name}"))]).ready();
    assert_eq!(told(&socket), "READY=1");
}

#[test]
fn without_a_manager_or_with_a_wrong_name_nothing_happens() {
    let long = format!("/{}", "x".repeat(200));
    for name in ["", "relative/path", "vsock:2:1234", "/nonexistent/notify", &long, "@", "/a\0b"] {
        let service = found(&[("NOTIFY_SOCKET", name), ("WATCHDOG_USEC", "1000000")]);
        service.ready();
        service.stopping();
    }
    found(&[]).ready();
}

#[test]
fn a_manager_that_does_not_read_does_not_stop_the_agent() {
    let (_directory, _socket, name) = manager();
    let service = found(&[("NOTIFY_SOCKET", &name)]);
    for _ in 0..10_000 {
        service.ready();
    }
}

#[test]
fn the_watchdog_is_meant_for_this_process_and_has_an_interval() {
    let interval = |variables: &[(&str, &str)]| {
        found(&[&[("NOTIFY_SOCKET", "/run/notify")], variables].concat()).watchdog
    };
    let second = Some(Duration::from_secs(1));
    assert_eq!(interval(&[("WATCHDOG_USEC", "1000000")]), second);
    assert_eq!(interval(&[("WATCHDOG_USEC", "1000000"), ("WATCHDOG_PID", "4711")]), second);
    for other in ["1", "x", "-1", "4711 "] {
        assert_eq!(interval(&[("WATCHDOG_USEC", "1000000"), ("WATCHDOG_PID", other)]), None, "{other}");
    }
    for wrong in ["0", "999", "1s", "-1000000", "99999999999999999999"] {
        assert_eq!(interval(&[("WATCHDOG_USEC", wrong)]), None, "{wrong}");
    }
}

#[tokio::test]
async fn the_watchdog_is_fed_only_while_there_is_progress() {
    let (_directory, socket, name) = manager();
    let service = found(&[("NOTIFY_SOCKET", &name), ("WATCHDOG_USEC", "20000")]);
    let stop = CancellationToken::new();
    let alive = AtomicBool::new(true);
    let watching = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        alive.store(false, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(50)).await;
        socket.set_nonblocking(true).unwrap();
        let mut fed = 0;
        while socket.recv(&mut [0; 64]).is_ok() {
            fed += 1;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        let starved = socket.recv(&mut [0; 64]).is_err();
        alive.store(true, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(100)).await;
        let fed_again = socket.recv(&mut [0; 64]).is_ok();
        stop.cancel();
        (fed >= 2, starved, fed_again)
    };
    let feeding = service.feed_watchdog(|| alive.load(Ordering::Relaxed), stop.clone());
    let ((), seen) = tokio::join!(feeding, watching);
    assert_eq!(seen, (true, true, true));
}

#[tokio::test]
async fn without_a_watchdog_feeding_ends_at_once() {
    let (_directory, _socket, name) = manager();
    let service = found(&[("NOTIFY_SOCKET", &name)]);
    tokio::time::timeout(Duration::from_secs(5), service.feed_watchdog(|| true, CancellationToken::new()))
        .await
        .unwrap();
}
