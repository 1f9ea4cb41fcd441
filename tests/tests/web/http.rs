//! A request as small as it can be, from inside a node.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    time::Duration,
};

use loden_tests::node::Node;

/// Status, headers and body of an answer to `GET path` at a loopback port of the node.
pub(crate) fn get(node: &Node, port: u16, path: &str, host: &str) -> (u16, String, String) {
    node.netns().run(|| {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, head.to_lowercase(), body.to_owned())
    })
}
