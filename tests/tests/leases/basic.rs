//! One, two, three nodes and nothing goes wrong.

use crate::cluster::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_see_each_other_come_and_go() {
    let etcd = etcd_with(CONFIG);
    let one = Node::start(&etcd, 1).await;
    let two = Node::start(&etcd, 2).await;
    let three = Node::start(&etcd, 3).await;
    one.until("one sees two and three", |cluster| peers_are(cluster, &[2, 3])).await;
    two.until("two sees one and three", |cluster| peers_are(cluster, &[1, 3])).await;
    three.until("three sees one and two", |cluster| peers_are(cluster, &[1, 2])).await;
    assert_eq!(one.now().peers[&two.lease.subnet].attrs, attrs(2));

    let freed = three.lease.subnet;
    three.keeper.release().await.unwrap();
    one.until("one sees three go", |cluster| peers_are(cluster, &[2])).await;
    assert_eq!(etcd.ctl(&["get", &key(freed)]).unwrap(), "");
}
