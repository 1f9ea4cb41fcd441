//! A kubelet's side of the Container Runtime Interface, as far as sandboxes go: of `runtime.v1` the messages and fields that
//! are used here, by their numbers in `api.proto` of k8s.io/cri-api.

use std::{collections::HashMap, path::Path};

use prost::Message;
use tonic::{
    Request, Status,
    client::Grpc,
    codegen::http::uri::PathAndQuery,
    transport::{Channel, Endpoint},
};
use tonic_prost::ProstCodec;

#[derive(Clone, PartialEq, Message)]
struct Id {
    #[prost(string, tag = "1")]
    pod_sandbox_id: String,
}

#[derive(Clone, PartialEq, Message)]
struct Empty {}

#[derive(Clone, PartialEq, Message)]
struct RunRequest {
    #[prost(message, optional, tag = "1")]
    config: Option<Config>,
}

/// `PodSandboxConfig`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Config {
    #[prost(message, optional, tag = "1")]
    pub(super) metadata: Option<Metadata>,
    #[prost(string, tag = "2")]
    pub(super) hostname: String,
    #[prost(string, tag = "3")]
    pub(super) log_directory: String,
    #[prost(message, repeated, tag = "5")]
    pub(super) port_mappings: Vec<PortMapping>,
    #[prost(message, optional, tag = "8")]
    pub(super) linux: Option<Linux>,
}

/// `PodSandboxMetadata`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Metadata {
    #[prost(string, tag = "1")]
    pub(super) name: String,
    #[prost(string, tag = "2")]
    pub(super) uid: String,
    #[prost(string, tag = "3")]
    pub(super) namespace: String,
}

/// `PortMapping`; the protocol 0 is TCP.
#[derive(Clone, PartialEq, Message)]
pub(super) struct PortMapping {
    #[prost(int32, tag = "2")]
    pub(super) container_port: i32,
    #[prost(int32, tag = "3")]
    pub(super) host_port: i32,
}

/// `LinuxPodSandboxConfig`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Linux {
    #[prost(string, tag = "1")]
    pub(super) cgroup_parent: String,
}

#[derive(Clone, PartialEq, Message)]
struct StatusRequest {
    #[prost(string, tag = "1")]
    pod_sandbox_id: String,
    #[prost(bool, tag = "2")]
    verbose: bool,
}

/// `PodSandboxStatusResponse`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct SandboxStatus {
    #[prost(message, optional, tag = "1")]
    pub(super) status: Option<PodStatus>,
    /// What the runtime adds for people, in JSON.
    #[prost(map = "string, string", tag = "2")]
    pub(super) info: HashMap<String, String>,
}

/// `PodSandboxStatus`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct PodStatus {
    #[prost(message, optional, tag = "5")]
    pub(super) network: Option<Network>,
}

/// `PodSandboxNetworkStatus`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Network {
    #[prost(string, tag = "1")]
    pub(super) ip: String,
    #[prost(message, repeated, tag = "2")]
    pub(super) additional_ips: Vec<Ip>,
}

/// `PodIP`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Ip {
    #[prost(string, tag = "1")]
    pub(super) ip: String,
}

#[derive(Clone, PartialEq, Message)]
struct RuntimeStatus {
    #[prost(message, optional, tag = "1")]
    status: Option<Conditions>,
}

#[derive(Clone, PartialEq, Message)]
struct Conditions {
    #[prost(message, repeated, tag = "1")]
    conditions: Vec<Condition>,
}

/// `RuntimeCondition`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Condition {
    #[prost(string, tag = "1")]
    pub(super) kind: String,
    #[prost(bool, tag = "2")]
    pub(super) status: bool,
    #[prost(string, tag = "4")]
    pub(super) message: String,
}

/// A connection to a runtime.
#[derive(Clone, Debug)]
pub(super) struct Client {
    channel: Channel,
}

impl Client {
    pub(super) async fn connect(socket: &Path) -> Result<Self, tonic::transport::Error> {
        let channel = Endpoint::from_shared(format!("unix://{}", socket.display()))?.connect().await?;
        Ok(Self { channel })
    }

    /// `RunPodSandbox`: the sandbox's id.
    pub(super) async fn run(&self, config: Config) -> Result<String, Status> {
        let answer: Id = self.call("RunPodSandbox", RunRequest { config: Some(config) }).await?;
        Ok(answer.pod_sandbox_id)
    }

    /// `PodSandboxStatus`, with what the runtime adds.
    pub(super) async fn sandbox(&self, id: &str) -> Result<SandboxStatus, Status> {
        self.call("PodSandboxStatus", StatusRequest { pod_sandbox_id: id.to_owned(), verbose: true }).await
    }

    /// `StopPodSandbox`.
    pub(super) async fn stop(&self, id: &str) -> Result<(), Status> {
        self.call::<_, Empty>("StopPodSandbox", Id { pod_sandbox_id: id.to_owned() }).await.map(drop)
    }

    /// `RemovePodSandbox`.
    pub(super) async fn remove(&self, id: &str) -> Result<(), Status> {
        self.call::<_, Empty>("RemovePodSandbox", Id { pod_sandbox_id: id.to_owned() }).await.map(drop)
    }

    /// The condition `NetworkReady` of `Status`.
    pub(super) async fn network_ready(&self) -> Result<Condition, Status> {
        let answer: RuntimeStatus = self.call("Status", Empty {}).await?;
        let conditions = answer.status.unwrap_or_default().conditions;
        let ready = conditions.into_iter().find(|condition| condition.kind == "NetworkReady");
        ready.ok_or_else(|| Status::not_found("no condition NetworkReady"))
    }

    async fn call<Q, A>(&self, method: &str, question: Q) -> Result<A, Status>
    where
        Q: Message + Send + 'static,
        A: Message + Default + Send + 'static,
    {
        let path = format!("/runtime.v1.RuntimeService/{method}");
        let path = PathAndQuery::try_from(path).map_err(|error| Status::internal(error.to_string()))?;
        let mut grpc = Grpc::new(self.channel.clone());
        grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
        let answer = grpc.unary(Request::new(question), path, ProstCodec::<Q, A>::default()).await?;
        Ok(answer.into_inner())
    }
}
