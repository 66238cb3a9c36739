//! Global memory: buffers with names and limits. An access outside all of them, a write to one that is only read, and an access
//! to what another CTA of the launch has written, are faults.

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
    /// Of each byte the CTA that wrote it last, by its number among those of all launches; 0 where none did. Empty where none may.
    writers: Vec<u32>,
}

/// The buffers that launches work on.
#[derive(Clone, Debug, Default)]
pub struct GlobalMemory {
    /// In the order of their addresses.
    buffers: Vec<Buffer>,
    /// Number of the CTA that runs, among those of all launches, from 1 on.
    cta: u32,
    /// Number of the first CTA of its launch.
    first_cta: u32,
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
        let writers = vec![0; if access == Access::Read { 0 } else { bytes.len() }];
        self.buffers.push(Buffer { name: name.into(), address, bytes, access, writers });
        address
    }

    /// What the buffer at `address` (as [`Self::add`] has told it) holds now; `None` where none begins.
    pub fn bytes(&self, address: u64) -> Option<&[u8]> {
        self.buffers.iter().find(|buffer| buffer.address == address).map(|buffer| &buffer.bytes[..])
    }

    /// The accesses from now on are those of the next CTA, of a new launch or of the one before.
    pub(crate) fn begin_cta(&mut self, of_new_launch: bool) {
        self.cta += 1;
        if of_new_launch {
            self.first_cta = self.cta;
        }
    }

    /// Reads `into.len()` bytes from an address that is a multiple of `alignment`.
    pub(crate) fn read_into(&self, lane: usize, address: u64, alignment: usize, into: &mut [u8]) -> Result<(), Fault> {
        check_alignment(lane, address, alignment)?;
        let (index, at) = self.find(lane, address, into.len())?;
        self.check_writers(lane, address, &self.buffers[index], at, into.len())?;
        into.copy_from_slice(&self.buffers[index].bytes[at..at + into.len()]);
        Ok(())
    }

    /// Writes bytes, aligned to their number.
    pub(crate) fn write(&mut self, lane: usize, address: u64, bytes: &[u8]) -> Result<(), Fault> {
        check_alignment(lane, address, bytes.len())?;
        let (index, at) = self.find(lane, address, bytes.len())?;
        self.check_writers(lane, address, &self.buffers[index], at, bytes.len())?;
        let buffer = &mut self.buffers[index];
        if buffer.access == Access::Read {
            return Err(Fault::ReadOnly { lane, address, buffer: buffer.name.clone() });
        }
        buffer.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        buffer.writers[at..at + bytes.len()].fill(self.cta);
        Ok(())
    }

    /// Nothing orders the CTAs of a launch: what one writes, no other reads or writes.
    fn check_writers(&self, lane: usize, address: u64, buffer: &Buffer, at: usize, bytes: usize) -> Result<(), Fault> {
        let writers = buffer.writers.get(at..at + bytes).unwrap_or_default();
        let other = writers.iter().position(|&writer| writer >= self.first_cta.max(1) && writer != self.cta);
        match other {
            None => Ok(()),
            Some(offset) => Err(Fault::OtherCta {
                lane,
                address: address + offset as u64,
                buffer: buffer.name.clone(),
                cta: writers[offset] - self.first_cta,
            }),
        }
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

    #[test]
    fn ctas_of_a_launch_do_not_meet() {
        let mut memory = GlobalMemory::new();
        let a = memory.add("a", vec![1; 16], Access::ReadWrite);
        memory.begin_cta(true);
        memory.write(0, a, &[7; 4]).unwrap();
        memory.write(0, a, &[8; 4]).unwrap();
        memory.begin_cta(false);
        memory.write(0, a + 4, &[9; 4]).unwrap();
        let error = read(&memory, 0, a, 8).unwrap_err().to_string();
        assert!(
            error.ends_with(&format!("an access to a at {a:#x}, which CTA 0 of the same launch has written")),
            "{error}"
        );
        assert!(memory.write(0, a, &[7; 4]).is_err());
        // Launches follow each other.
        memory.begin_cta(true);
        assert_eq!(read(&memory, 0, a, 8).unwrap(), [8, 8, 8, 8, 9, 9, 9, 9]);
    }
}
