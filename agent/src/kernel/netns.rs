//! Other network namespaces, as this one knows them.

use std::{fs::File, os::fd::AsRawFd as _};

use rtnetlink::packet_route::{
    RouteNetlinkMessage,
    nsid::{NsidAttribute, NsidMessage},
};

use super::{Kernel, Result};

impl Kernel {
    /// The id by which this namespace knows the one that a file stands for; none where it has no id yet, so that no
    /// link of this namespace leads there.
    ///
    /// # Errors
    ///
    /// As the kernel says; also where the file is no network namespace.
    pub async fn netns_id(&self, netns: &File) -> Result<Option<i32>> {
        let mut message = NsidMessage::default();
        message.attributes.push(NsidAttribute::Fd(netns.as_raw_fd() as u32));
        let answer = self.get("asking for a namespace's id", RouteNetlinkMessage::GetNsId(message)).await?;
        let RouteNetlinkMessage::NewNsId(answer) = answer else { return Ok(None) };
        let id = answer.attributes.iter().find_map(|attribute| match attribute {
            NsidAttribute::Id(id) => Some(*id),
            _ => None,
        });
        Ok(id.filter(|id| *id >= 0))
    }
}
