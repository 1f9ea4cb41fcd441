//! The socket of the generic netlink family `wireguard`.

use std::{fmt, io};

use netlink_packet_generic::{
    GenlFamily, GenlHeader, GenlMessage,
    ctrl::{GenlCtrl, GenlCtrlCmd, nlas::GenlCtrlAttrs},
};
use netlink_packet_wireguard::WireguardMessage;
use nix::errno::Errno;
use rtnetlink::{
    packet_core::{
        Emitable, NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
        ParseableParametrized,
    },
    sys::{Socket, SocketAddr, protocols::NETLINK_GENERIC},
};

use super::message;
use crate::{
    kernel::{DUMP_TRIES, KernelError, Result, refused},
    wireguard::{Actual, Plan},
};

/// More than the kernel puts into one datagram of a dump (32 KiB).
const DATAGRAM: usize = 64 * 1024;

/// Asks and tells the kernel about WireGuard devices, in the network namespace of the thread that opened it.
pub struct WireguardSocket {
    socket: Socket,
    /// The kernel's number of the family `wireguard`.
    family: u16,
}

impl fmt::Debug for WireguardSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WireguardSocket").field("family", &self.family).finish_non_exhaustive()
    }
}

impl WireguardSocket {
    /// Opens it; the kernel loads its module `wireguard` for it where it can.
    ///
    /// # Errors
    ///
    /// [`KernelError::NoWireguard`], or as the kernel says.
    pub fn open() -> Result<Self> {
        let socket = Socket::new(NETLINK_GENERIC).map_err(KernelError::Connect)?;
        let connect = || {
            socket.connect(&SocketAddr::new(0, 0))?;
            // The answer is there as soon as the request is sent: one that is not there will not come.
            socket.set_non_blocking(true)?;
            // Without, an error would bring the request back, and the keys in it.
            socket.set_cap_ack(true)
        };
        connect().map_err(KernelError::Connect)?;
        let mut opened = Self { socket, family: 0 };
        opened.family = opened.find_family()?;
        Ok(opened)
    }

    fn find_family(&self) -> Result<u16> {
        let what = "looking for the netlink family wireguard";
        let name = GenlCtrlAttrs::FamilyName(WireguardMessage::family_name().to_owned());
        let question = GenlCtrl { cmd: GenlCtrlCmd::GetFamily, nlas: vec![name] };
        let answers = match self.ask(what, &GenlMessage::from_payload(question), NLM_F_ACK) {
            Err(error) if error.errno() == Some(Errno::ENOENT) => return Err(KernelError::NoWireguard),
            answers => answers?,
        };
        let id =
            answers.unwrap_or_default().into_iter().flat_map(|answer| answer.nlas).find_map(|attribute| {
                match attribute {
                    GenlCtrlAttrs::FamilyId(id) => Some(id),
                    _ => None,
                }
            });
        id.ok_or(KernelError::NoWireguard)
    }

    /// What a device has, keys included.
    ///
    /// # Errors
    ///
    /// As the kernel says: `ENODEV` where there is no such device.
    pub fn device(&self, index: u32) -> Result<Actual> {
        let what = format!("reading the WireGuard device with index {index}");
        for _ in 0..DUMP_TRIES {
            if let Some(answers) = self.ask(&what, &self.message(message::question(index)), NLM_F_DUMP)? {
                return Ok(message::read(&answers));
            }
        }
        Err(KernelError::Restless { what })
    }

    /// Carries out a plan; peers that it does not name keep their sessions.
    ///
    /// # Errors
    ///
    /// As the kernel says: `EADDRINUSE` where another socket has the port.
    pub fn apply(&self, index: u32, plan: &Plan) -> Result<()> {
        let what = format!("setting up the WireGuard device with index {index}");
        for message in message::changes(index, plan) {
            self.ask(&what, &self.message(message), NLM_F_ACK)?;
        }
        Ok(())
    }

    fn message(&self, payload: WireguardMessage) -> GenlMessage<WireguardMessage> {
        let mut message = GenlMessage::from_payload(payload);
        message.set_resolved_family_id(self.family);
        message
    }

    /// Sends a request and reads everything up to its end; `None` where a dump was interrupted by a change.
    fn ask<P>(&self, what: &str, request: &GenlMessage<P>, flags: u16) -> Result<Option<Vec<P>>>
    where
        P: Clone + fmt::Debug + GenlFamily + Emitable + ParseableParametrized<[u8], GenlHeader>,
    {
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::WouldBlock => KernelError::Silent { what: what.to_owned() },
            _ => KernelError::Refused { what: what.to_owned(), source },
        };
        self.send(request, flags).map_err(failed)?;
        let mut found = Vec::new();
        let mut interrupted = false;
        loop {
            let mut datagram = Vec::with_capacity(DATAGRAM);
            self.socket.recv(&mut datagram, 0).map_err(failed)?;
            let mut rest = datagram.as_slice();
            while !rest.is_empty() {
                // What is wrong with it is not said, as it may hold keys.
                let unreadable = || KernelError::Unreadable { what: what.to_owned() };
                let answer = NetlinkMessage::<GenlMessage<P>>::deserialize(rest).map_err(|_| unreadable())?;
                interrupted |= answer.header.flags & NLM_F_DUMP_INTR != 0;
                let length = usize::try_from(answer.header.length).unwrap_or(usize::MAX).next_multiple_of(4);
                rest = rest.get(length.max(16)..).unwrap_or_default();
                match answer.payload {
                    NetlinkPayload::InnerMessage(message) => found.push(message.payload),
                    NetlinkPayload::Error(error) if error.code.is_none() => return Ok(Some(found)),
                    NetlinkPayload::Error(error) => return Err(refused(what, error.raw_code())),
                    NetlinkPayload::Done(done) if done.code != 0 => return Err(refused(what, done.code)),
                    NetlinkPayload::Done(_) => return Ok((!interrupted).then_some(found)),
                    _ => {}
                }
            }
        }
    }

    fn send<P>(&self, request: &GenlMessage<P>, flags: u16) -> io::Result<()>
    where
        P: Clone + fmt::Debug + GenlFamily + Emitable,
    {
        let mut message = NetlinkMessage::from(request.clone());
        message.header.flags = NLM_F_REQUEST | flags;
        message.finalize();
        let mut datagram = vec![0; message.buffer_len()];
        message.serialize(&mut datagram);
        // What an earlier request has left, should one have been given up on.
        while self.socket.recv(&mut Vec::with_capacity(DATAGRAM), 0).is_ok() {}
        self.socket.send(&datagram, 0).map(drop)
    }
}
