//! Global memory: buffers with names and limits. An access outside all of them, or a write to one that is only read, is a fault.

use crate::error::Fault;

/// Addresses between buffers that belong to none, so that a row too far is not the neighbour's.
const GAP_BYTES: u64 = 1 << 20;
/// Where the first buffer begins; far above the parameters, so that 32 bits do not suffice.
const FIRST_ADDRESS: u64 = 0x7f00_0000_0000;
/// What `cudaMalloc` aligns to.
const ALIGNMENT: u64 = 256;

/// Who may do what with a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// A kernel must not write it.
    Read,
    /// Kernels read and write it.
    ReadWrite,
}

#[derive(Clone, Debug)]
struct Buffer {
    name: String,
    address: u64,
    bytes: Vec<u8>,
    access: Access,
}

/// The buffers that launches work on.
#[derive(Clone, Debug, Default)]
pub struct GlobalMemory {
    /// In the order of their addresses.
    buffers: Vec<Buffer>,
}

impl GlobalMemory {
    /// Memory without buffers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a buffer of exactly these bytes and tells its address, a multiple of 256.
    pub fn add(&mut self, name: &str, bytes: Vec<u8>, access: Access) -> u64 {
        let end = self.buffers.last().map(|last| last.address + last.bytes.len() as u64 + GAP_BYTES);
        let address = end.unwrap_or(FIRST_ADDRESS).next_multiple_of(ALIGNMENT);
        self.buffers.push(Buffer { name: name.into(), address, bytes, access });
        address
    }

    /// What the buffer at `address` (as [`Self::add`] has told it) holds now; `None` where none begins.
    pub fn bytes(&self, address: u64) -> Option<&[u8]> {
        self.buffers.iter().find(|buffer| buffer.address == address).map(|buffer| &buffer.bytes[..])
    }

    /// Reads `into.len()` bytes from an address that is a multiple of `alignment`.
    pub(crate) fn read_into(&self, lane: usize, address: u64, alignment: usize, into: &mut [u8]) -> Result<(), Fault> {
        check_alignment(lane, address, alignment)?;
        let (index, at) = self.find(lane, address, into.len())?;
        into.copy_from_slice(&self.buffers[index].bytes[at..at + into.len()]);
        Ok(())
    }

    /// Writes bytes, aligned to their number.
    pub(crate) fn write(&mut self, lane: usize, address: u64, bytes: &[u8]) -> Result<(), Fault> {
        let (index, at) = self.locate(lane, address, bytes.len())?;
        let buffer = &mut self.buffers[index];
        if buffer.access == Access::Read {
            return Err(Fault::ReadOnly { lane, address, buffer: buffer.name.clone() });
        }
        buffer.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn locate(&self, lane: usize, address: u64, bytes: usize) -> Result<(usize, usize), Fault> {
        check_alignment(lane, address, bytes)?;
        self.find(lane, address, bytes)
    }

    /// The buffer that holds these bytes, and where.
    fn find(&self, lane: usize, address: u64, bytes: usize) -> Result<(usize, usize), Fault> {
        let behind = self.buffers.partition_point(|buffer| buffer.address <= address);
        let nearest = behind.checked_sub(1).map(|index| (index, &self.buffers[index]));
        if let Some((index, buffer)) = nearest {
            let at = (address - buffer.address) as usize;
            if at.checked_add(bytes).is_some_and(|end| end <= buffer.bytes.len()) {
                return Ok((index, at));
            }
        }
        let nearest = match nearest {
            Some((_, Buffer { name, address: begin, bytes, .. })) => {
                format!("{} bytes from the start of {name}, which has {}", address - begin, bytes.len())
            }
            None => "before every buffer".into(),
        };
        Err(Fault::OutsideGlobal { lane, address, bytes, nearest })
    }
}

pub(crate) fn check_alignment(lane: usize, address: u64, bytes: usize) -> Result<(), Fault> {
    if address.is_multiple_of(bytes.max(1) as u64) { Ok(()) } else { Err(Fault::Misaligned { lane, address, bytes }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(memory: &GlobalMemory, lane: usize, address: u64, bytes: usize) -> Result<Vec<u8>, Fault> {
        let mut value = vec![0; bytes];
        memory.read_into(lane, address, bytes, &mut value).map(|()| value)
    }

    #[test]
    fn buffers_end_where_they_end() {
        let mut memory = GlobalMemory::new();
        let a = memory.add("a", vec![1; 10], Access::Read);
        let b = memory.add("b", vec![2; 16], Access::ReadWrite);
        assert_eq!(read(&memory, 0, a + 8, 2).unwrap(), [1, 1]);
        let error = read(&memory, 3, a + 8, 4).unwrap_err().to_string();
        assert!(error.contains("lane 3") && error.contains("8 bytes from the start of a, which has 10"), "{error}");
        assert!(read(&memory, 0, a - 2, 2).unwrap_err().to_string().contains("before every buffer"));
        assert!(read(&memory, 0, b + 2, 4).unwrap_err().to_string().contains("no multiple of 4"));
        memory.write(0, b + 12, &[7; 4]).unwrap();
        assert_eq!(memory.bytes(b).unwrap()[11..], [2, 7, 7, 7, 7]);
        assert!(memory.write(0, a, &[7]).unwrap_err().to_string().contains("only read"));
        assert!(memory.bytes(a + 1).is_none());
    }
}
