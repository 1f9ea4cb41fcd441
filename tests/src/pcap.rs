//! Captures of frames in the classic pcap format (microseconds, Ethernet), for a person with Wireshark.

use std::{fs, io, path::Path};

/// Magic number, version 2.4, zone 0, accuracy 0, longest packet, LINKTYPE_ETHERNET; in little-endian order.
const HEADER: [u32; 6] = [0xa1b2_c3d4, 4 << 16 | 2, 0, 0, 0x4_0000, 1];

/// The bytes of a capture of these frames, one microsecond apart.
#[must_use]
pub fn capture<'a>(frames: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut out: Vec<u8> = HEADER.iter().flat_map(|word| word.to_le_bytes()).collect();
    for (number, frame) in frames.into_iter().enumerate() {
        let len = frame.len() as u32;
        let record = [0, number as u32, len, len];
        out.extend(record.iter().flat_map(|word| word.to_le_bytes()));
        out.extend_from_slice(frame);
    }
    out
}

/// Writes a capture, with the directories that its path needs.
///
/// # Errors
///
/// Where the file cannot be written.
pub fn write<'a>(path: &Path, frames: impl IntoIterator<Item = &'a [u8]>) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    fs::write(path, capture(frames))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_capture_has_a_header_and_a_record_for_each_frame() {
        let bytes = capture([[1u8; 14].as_slice(), &[2; 60]]);
        assert_eq!(bytes.len(), 24 + 16 + 14 + 16 + 60);
        assert_eq!(bytes[..8], [0xd4, 0xc3, 0xb2, 0xa1, 2, 0, 4, 0]);
        assert_eq!(bytes[20..24], [1, 0, 0, 0], "Ethernet");
        assert_eq!(bytes[32..40], [14, 0, 0, 0, 14, 0, 0, 0], "captured and original length");
        assert_eq!(bytes[40], 1);
    }
}
