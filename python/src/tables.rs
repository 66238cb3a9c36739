//! Block tables and lengths, copied out of what Python hands over, so that planning needs no Python.

use crate::errors::{
    Failure, Index, Integer, Result, has, index_of, invalid, no_integer, own_error, type_name, wrong_type,
};
use crate::foreign;
use crate::tensor::{Element, Tensor, is_torch};
use pat_rs::{DecodeBatch, QueryTokens};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyFloat, PyList, PySequence, PyTuple, PyType};
use std::ops::Range;

/// The used part of a batch's block tables.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tables {
    /// Page ids of all rows, those that the lengths need.
    ids: Vec<u32>,
    /// Where each row ends in `ids`.
    ends: Vec<usize>,
    lengths: Vec<u32>,
    query_tokens: Counts,
    page_size: u32,
    num_pages: u32,
}

/// Query tokens of each sequence.
#[derive(Clone, Debug, Default)]
enum Counts {
    #[default]
    One,
    Uniform(u32),
    Ragged(Vec<u32>),
    /// The same tree in every sequence.
    Tree(Parents),
    Trees(Vec<Parents>),
}

/// By query token of a sequence, its parent among them.
type Parents = Vec<Option<u32>>;

const FORMS: &str = "a list of lists of page ids, a 2-D int32 tensor or array, or a tuple (indptr, ids) of lists, 1-D int32 \
                     tensors or arrays";

/// What a call says of a batch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Given<'a, 'py> {
    pub(crate) block_tables: &'a Bound<'py, PyAny>,
    /// The row of `block_tables` that each sequence has.
    pub(crate) table_rows: Option<&'a Bound<'py, PyAny>>,
    pub(crate) lengths: &'a Bound<'py, PyAny>,
    pub(crate) queries: Queries<'a, 'py>,
}

impl Tables {
    /// Copies what is given into the memory of `spare`.
    pub(crate) fn read(spare: Self, given: Given<'_, '_>, page_size: u32, num_pages: u32) -> Result<Self> {
        let Self { mut ids, mut ends, .. } = spare;
        ids.clear();
        ends.clear();
        let expected = "a list of integers or a 1-D int32 tensor or array";
        let lengths = Integers::of("lengths", given.lengths, expected)?;
        let table_rows = given.table_rows.map(|rows| Integers::of("table_rows", rows, expected)).transpose()?;
        let source = Source::of(given.block_tables)?;
        // Counted before anything is read: a tensor of any number of elements may take no memory (`expand`).
        let (rows, expected) = (lengths.count(), format!("one per length ({})", lengths.count()));
        match (&table_rows, &source) {
            (None, _) if source.rows() == rows => {}
            (None, _) => return Err(invalid("block_tables", format!("{} rows", source.rows()), expected)),
            (Some(given), Source::Padded(..)) if given.count() == rows => {}
            (Some(given), Source::Padded(..)) => {
                return Err(invalid("table_rows", format!("{} rows", given.count()), expected));
            }
            (Some(_), _) => {
                return Err(invalid("table_rows", "some", "None, but for block_tables that are a 2-D tensor or array"));
            }
        }
        let lengths = read_lengths(&lengths)?;
        let query_tokens = given.queries.read(lengths.len())?;
        let mut tables = Self { ids, ends, lengths, query_tokens, page_size, num_pages };
        match source {
            Source::Rows(rows) => tables.read_rows(rows.iter())?,
            Source::Csr(indptr, ids) => tables.read_csr(&indptr, &ids)?,
            Source::Padded(object, rows) => {
                let table_rows = table_rows.map(|given| given.read(0..given.count())).transpose()?;
                // Anew: reading the others may have run code of theirs.
                let tensor = Tensor::read("block_tables", &object, None)?;
                if tensor.rank != 2 || tensor.sizes[0] != rows as i64 {
                    let expected = format!("{rows} rows, as before");
                    return Err(invalid("block_tables", format!("shape {}", tensor.shape()), expected));
                }
                tables.read_padded(&tensor, table_rows.as_deref())?;
            }
        }
        Ok(tables)
    }

    /// Whether rows are query tokens, of which a sequence may have any number.
    pub(crate) fn has_query_tokens(&self) -> bool {
        !matches!(self.query_tokens, Counts::One)
    }

    /// Sequences of the batch.
    pub(crate) fn sequences(&self) -> usize {
        self.lengths.len()
    }

    /// Whether planning takes no longer than handing the interpreter to other threads, and waiting to get it back, may.
    pub(crate) fn are_few(&self) -> bool {
        let most_tokens = match &self.query_tokens {
            Counts::One => 1,
            Counts::Uniform(tokens) => *tokens as usize,
            Counts::Ragged(tokens) => tokens.iter().max().map_or(1, |&tokens| tokens as usize),
            Counts::Tree(parents) => parents.len(),
            Counts::Trees(trees) => trees.iter().map(Vec::len).max().unwrap_or(1),
        };
        self.ids.len().saturating_mul(most_tokens) <= 1 << 16
    }

    /// Hands the batch, a row per query token, to `use_it`; borrows only what is here.
    pub(crate) fn with_batch<R>(
        &self,
        use_it: impl FnOnce(&DecodeBatch<'_>) -> pat_rs::Result<R>,
    ) -> pat_rs::Result<R> {
        let mut begin = 0;
        let rows: Vec<&[u32]> =
            self.ends.iter().map(|&end| &self.ids[std::mem::replace(&mut begin, end)..end]).collect();
        let sequences = DecodeBatch::from_block_tables(&rows, &self.lengths, self.page_size, self.num_pages)?;
        match &self.query_tokens {
            Counts::One => use_it(&sequences),
            Counts::Uniform(tokens) => use_it(&QueryTokens::uniform(&sequences, *tokens)?.batch()),
            Counts::Ragged(counts) => use_it(&QueryTokens::ragged(&sequences, counts)?.batch()),
            Counts::Tree(parents) => use_it(&QueryTokens::tree(&sequences, parents)?.batch()),
            Counts::Trees(trees) => {
                let trees: Vec<_> = trees.iter().map(Vec::as_slice).collect();
                use_it(&QueryTokens::trees(&sequences, &trees)?.batch())
            }
        }
    }

    /// Entries of row `row` that its length needs, of `available`.
    fn needed(&self, row: usize, available: usize) -> usize {
        // A page size of 0 is refused with the batch.
        let needed = self.lengths[row]
            .checked_div(self.page_size)
            .map_or(available, |_| self.lengths[row].div_ceil(self.page_size) as usize);
        needed.min(available)
    }

    fn read_rows<'py>(&mut self, rows: impl Iterator<Item = Bound<'py, PyAny>>) -> Result<()> {
        let count = self.lengths.len();
        // A list may grow where an entry's own code runs.
        for (row, entries) in rows.take(count).enumerate() {
            if entries.is_instance_of::<PyList>() || entries.is_instance_of::<PyTuple>() {
                let needed = self.needed(row, entries.len()?);
                for position in 0..needed {
                    let name = || format!("block_tables[{row}][{position}]");
                    let id = integer(&entry(&entries, position, name)?, "an integer", name)?;
                    self.ids.push(self.page_id(row, position, id)?);
                }
            } else {
                let tensor = Tensor::read("block_tables", &entries, None)?;
                if tensor.rank != 1 {
                    return Err(invalid(format!("block_tables[{row}]"), format!("shape {}", tensor.shape()), FORMS));
                }
                let values = foreign::elements::<i32>(&tensor, &Element::I32)?;
                let stride = tensor.strides[0] as usize;
                let needed = self.needed(row, tensor.sizes[0] as usize);
                for position in 0..needed {
                    let id = self.page_id(row, position, i64::from(values[position * stride]))?;
                    self.ids.push(id);
                }
            }
            self.ends.push(self.ids.len());
        }
        Ok(())
    }

    fn read_padded(&mut self, tensor: &Tensor<'_>, table_rows: Option<&[i64]>) -> Result<()> {
        if tensor.rank != 2 {
            return Err(invalid("block_tables", format!("shape {}", tensor.shape()), FORMS));
        }
        let values = foreign::elements::<i32>(tensor, &Element::I32)?;
        let (available, columns) = (tensor.sizes[0] as usize, tensor.sizes[1] as usize);
        let (row_stride, stride) = (tensor.strides[0] as usize, tensor.strides[1] as usize);
        let rows = self.lengths.len();
        self.ids.reserve((0..rows).map(|row| self.needed(row, columns)).sum());
        for row in 0..rows {
            let table_row = match table_rows {
                None => row,
                Some(given) => usize::try_from(given[row]).ok().filter(|&row| row < available).ok_or_else(|| {
                    let expected = format!("one of the {available} rows of block_tables");
                    invalid(format!("table_rows[{row}]"), given[row], expected)
                })?,
            };
            let (begin, needed) = (self.ids.len(), self.needed(row, columns));
            if stride == 1 {
                let used = values.get(table_row * row_stride..).unwrap_or(&[]);
                // A negative id becomes one of 2^31 or more, which is never below `num_pages`.
                self.ids.extend(used[..needed].iter().map(|&id| id as u32));
            } else {
                self.ids.extend((0..needed).map(|column| values[table_row * row_stride + column * stride] as u32));
            }
            // The maximum first: one vectorised pass, and the offender is looked for only when there is one.
            let ids = &self.ids[begin..];
            if ids.iter().copied().max().is_some_and(|largest| largest >= self.num_pages) {
                let position = ids.iter().position(|&id| id >= self.num_pages).unwrap_or(0);
                self.page_id(table_row, position, i64::from(ids[position].cast_signed()))?;
            }
            self.ends.push(self.ids.len());
        }
        Ok(())
    }

    fn read_csr(&mut self, indptr: &Integers<'_>, ids: &Integers<'_>) -> Result<()> {
        let indptr = indptr.read(0..indptr.count())?;
        if indptr.first() != Some(&0) {
            let got = indptr.first().map_or("nothing".into(), ToString::to_string);
            return Err(invalid("block_tables[0] (indptr)", got, "a first entry of 0"));
        }
        for (row, pair) in indptr.windows(2).enumerate() {
            let (begin, end) = (pair[0], pair[1]);
            if end < begin || end > ids.count() as i64 {
                let expected = format!("{begin} to the number of ids, {}", ids.count());
                return Err(invalid(format!("block_tables[0][{}] (indptr)", row + 1), end, expected));
            }
        }
        // What lies behind the last row may be anything, of any length.
        let ids = ids.read(0..indptr.last().copied().unwrap_or(0) as usize)?;
        for (row, pair) in indptr.windows(2).enumerate() {
            let (begin, end) = (pair[0] as usize, pair[1] as usize);
            let needed = self.needed(row, end - begin);
            for (position, &id) in ids[begin..][..needed].iter().enumerate() {
                let id = self.page_id(row, position, id)?;
                self.ids.push(id);
            }
            self.ends.push(self.ids.len());
        }
        Ok(())
    }

    fn page_id(&self, row: usize, position: usize, id: i64) -> Result<u32> {
        u32::try_from(id).ok().filter(|id| *id < self.num_pages).ok_or_else(|| {
            let expected = format!("a page id below num_pages = {}", self.num_pages);
            invalid(format!("block_tables[{row}][{position}]"), id, expected)
        })
    }
}

/// Where block tables are read from.
enum Source<'py> {
    Rows(Bound<'py, PyList>),
    Csr(Integers<'py>, Integers<'py>),
    /// A tensor of two dimensions, and its rows.
    Padded(Bound<'py, PyAny>, usize),
}

impl<'py> Source<'py> {
    fn of(block_tables: &Bound<'py, PyAny>) -> Result<Self> {
        if let Ok(rows) = block_tables.cast::<PyList>() {
            return Ok(Self::Rows(rows.clone()));
        }
        if let Ok(pair) = block_tables.cast::<PyTuple>() {
            if pair.len() != 2 {
                return Err(wrong_type("block_tables", format!("a tuple of {}", pair.len()), FORMS));
            }
            // Rows that a caller has as tuples, of which two are no pair.
            if pair.iter().all(|entries| entries.is_instance_of::<PyTuple>()) {
                return Err(wrong_type("block_tables", "a tuple of tuples", FORMS));
            }
            let expected = "a list of integers or a 1-D int32 tensor or array";
            let indptr = Integers::of("block_tables[0]", &pair.get_item(0)?, expected)?;
            return Ok(Self::Csr(indptr, Integers::of("block_tables[1]", &pair.get_item(1)?, expected)?));
        }
        if !is_array(block_tables)? {
            return Err(wrong_type("block_tables", type_name(block_tables), FORMS));
        }
        let tensor = Tensor::read("block_tables", block_tables, None)?;
        if tensor.rank != 2 {
            return Err(invalid("block_tables", format!("shape {}", tensor.shape()), FORMS));
        }
        Ok(Self::Padded(block_tables.clone(), tensor.sizes[0] as usize))
    }

    fn rows(&self) -> usize {
        match self {
            Self::Rows(rows) => rows.len(),
            Self::Csr(indptr, _) => indptr.count().saturating_sub(1),
            Self::Padded(_, rows) => *rows,
        }
    }
}

/// What a call says of query tokens.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Queries<'a, 'py> {
    /// Their numbers.
    pub(crate) tokens: Option<&'a Bound<'py, PyAny>>,
    /// Their parents.
    pub(crate) parents: Option<&'a Bound<'py, PyAny>>,
    /// Whether the planner plans for trees.
    pub(crate) may_be_trees: bool,
}

impl Queries<'_, '_> {
    fn read(self, sequences: usize) -> Result<Counts> {
        match (self.tokens, self.parents) {
            (None, None) => Ok(Counts::One),
            (Some(counts), None) => Counts::read(counts, sequences),
            (None, Some(parents)) if self.may_be_trees => Counts::read_parents(parents, sequences),
            (None, Some(_)) => Err(invalid("parents", "some", "None: the planner was made without query_tree=True")),
            (Some(_), Some(_)) => {
                Err(invalid("parents", "some", "None beside query_tokens: parents say how many there are"))
            }
        }
    }
}

impl Counts {
    fn read_parents(parents: &Bound<'_, PyAny>, sequences: usize) -> Result<Self> {
        let check_trees = |trees: usize| {
            let expected = format!("one per sequence ({sequences})");
            if trees == sequences { Ok(()) } else { Err(invalid("parents", format!("{trees} trees"), expected)) }
        };
        if is_array(parents)? {
            let tensor = Tensor::read("parents", parents, None)?;
            return match tensor.rank {
                1 => Ok(Self::Tree(read_tree_array(&tensor)?)),
                2 => {
                    check_trees(tensor.sizes[0] as usize)?;
                    Ok(Self::Trees(read_tree_rows(&tensor)?))
                }
                _ => Err(invalid(
                    "parents",
                    format!("shape {}", tensor.shape()),
                    "one dimension, or two: a tree per row",
                )),
            };
        }
        let items = read_items("parents", parents, sequences)?;
        let is_one_tree = match items.first() {
            // What is no list is no tree: the parent is named that is none.
            Some(first) if first.is_instance_of::<PyFloat>() || first.is_instance_of::<PyBool>() => true,
            Some(first) => first.is_none() || matches!(index_of(first)?, Index::Is(_)),
            None => false,
        };
        if is_one_tree {
            return Ok(Self::Tree(read_tree("parents", &items)?));
        }
        check_trees(items.len())?;
        let trees = items.iter().enumerate().map(|(sequence, tree)| {
            let name = format!("parents[{sequence}]");
            if !is_array(tree)? {
                return read_tree(&name, &read_items(&name, tree, 0)?);
            }
            let tensor = Tensor::read(&name, tree, None)?;
            match tensor.rank {
                1 => read_tree_array(&tensor),
                _ => Err(invalid(&*name, format!("shape {}", tensor.shape()), "one dimension")),
            }
        });
        Ok(Self::Trees(trees.collect::<Result<_>>()?))
    }

    fn read(counts: &Bound<'_, PyAny>, sequences: usize) -> Result<Self> {
        if let tokens @ (Integer::Unsigned(_) | Integer::Other(_)) = counts.extract::<Integer>()? {
            return Ok(Self::Uniform(tokens.count("query_tokens", 1)?));
        }
        let expected = "an integer, or a list of integers or a 1-D int32 tensor or array";
        let counts = Integers::of("query_tokens", counts, expected)?;
        if counts.count() != sequences {
            let expected = format!("one per sequence ({sequences})");
            return Err(invalid("query_tokens", format!("{} counts", counts.count()), expected));
        }
        let count = |(row, count): (usize, i64)| {
            let name = || format!("query_tokens[{row}]");
            u32::try_from(count).map_err(|_| invalid(name(), count, format!("0 to {}", DecodeBatch::MAX_TOKENS)))
        };
        Ok(Self::Ragged(counts.read(0..sequences)?.into_iter().enumerate().map(count).collect::<Result<_>>()?))
    }
}

/// What a list of parents, or of `trees` trees, holds.
fn read_items<'py>(name: &str, list: &Bound<'py, PyAny>, trees: usize) -> Result<Vec<Bound<'py, PyAny>>> {
    let expected = "a list of parents, or one such list for each sequence";
    let Ok(list) = list.cast::<PySequence>() else { return Err(wrong_type(name, type_name(list), expected)) };
    let unreadable = |error: PyErr| -> Result<Failure> {
        let error = own_error(list.py(), error)?;
        Ok(wrong_type(name, format!("{} that cannot be read", type_name(list)), expected).caused_by(list.py(), error))
    };
    let read = || -> PyResult<std::result::Result<Vec<_>, usize>> {
        let count = list.len()?;
        // Neither a tree nor so many trees.
        if count > QueryTokens::MAX_OF_TREE.max(trees) {
            return Ok(Err(count));
        }
        (0..count).map(|position| list.get_item(position)).collect::<PyResult<_>>().map(Ok)
    };
    match read() {
        Ok(Ok(items)) => Ok(items),
        Ok(Err(count)) => Err(too_large_a_tree(name, count)),
        Err(error) => Err(unreadable(error)?),
    }
}

fn too_large_a_tree(name: &str, tokens: usize) -> Failure {
    let expected = format!("at most {} in a tree", QueryTokens::MAX_OF_TREE);
    invalid(name, format!("{tokens} query tokens"), expected)
}

/// Whether these are integers in memory, which are read at once.
fn is_array(values: &Bound<'_, PyAny>) -> Result<bool> {
    let py = values.py();
    Ok(!values.is_instance_of::<PyType>() && (is_torch(values)? || has(values, intern!(py, "__dlpack__"))?))
}

/// Parents of a tree in a tensor of one dimension.
fn read_tree_array(tensor: &Tensor<'_>) -> Result<Parents> {
    let (tokens, stride) = (tensor.sizes[0] as usize, tensor.strides[0] as usize);
    if tokens > QueryTokens::MAX_OF_TREE {
        return Err(too_large_a_tree(tensor.name, tokens));
    }
    let parents = ParentElements::read(tensor)?;
    (0..tokens).map(|token| parent_of(format!("{}[{token}]", tensor.name), parents.at(token * stride))).collect()
}

/// Parents of the trees in the rows of a tensor of two dimensions.
fn read_tree_rows(tensor: &Tensor<'_>) -> Result<Vec<Parents>> {
    let [trees, tokens] = [0, 1].map(|dim| tensor.sizes[dim] as usize);
    let [tree_stride, stride] = [0, 1].map(|dim| tensor.strides[dim] as usize);
    if tokens > QueryTokens::MAX_OF_TREE {
        return Err(too_large_a_tree(&format!("{}[0]", tensor.name), tokens));
    }
    let parents = ParentElements::read(tensor)?;
    let parent = |tree, token| {
        let parent = parents.at(tree * tree_stride + token * stride);
        parent_of(format!("{}[{tree}][{token}]", tensor.name), parent)
    };
    (0..trees).map(|tree| (0..tokens).map(|token| parent(tree, token)).collect()).collect()
}

/// The elements of a tensor of parents: torch and numpy make int64 of integers unless they are told otherwise.
enum ParentElements<'a> {
    I32(&'a [i32]),
    I64(&'a [i64]),
}

impl<'a> ParentElements<'a> {
    fn read(tensor: &'a Tensor<'_>) -> Result<Self> {
        match tensor.element {
            Element::I32 => Ok(Self::I32(foreign::elements(tensor, &Element::I32)?)),
            Element::I64 => Ok(Self::I64(foreign::elements(tensor, &Element::I64)?)),
            _ => Err(wrong_type(tensor.name, format!("a tensor of {}", tensor.element), "int32 or int64")),
        }
    }

    fn at(&self, offset: usize) -> i64 {
        match self {
            Self::I32(elements) => elements[offset].into(),
            Self::I64(elements) => elements[offset],
        }
    }
}

/// Parents of a tree, as integers, where -1 and None are none.
fn read_tree(name: &str, parents: &[Bound<'_, PyAny>]) -> Result<Parents> {
    let parent = |(token, parent): (usize, &Bound<'_, PyAny>)| {
        if parent.is_none() {
            return Ok(None);
        }
        let name = || format!("{name}[{token}]");
        parent_of(name(), integer(parent, "an integer or None", name)?)
    };
    parents.iter().enumerate().map(parent).collect()
}

fn parent_of(name: String, parent: i64) -> Result<Option<u32>> {
    match u32::try_from(parent) {
        Ok(parent) => Ok(Some(parent)),
        Err(_) if parent == -1 => Ok(None),
        Err(_) => Err(invalid(name, parent, "None, -1 (none), or the index of a query token before it")),
    }
}

fn read_lengths(lengths: &Integers<'_>) -> Result<Vec<u32>> {
    lengths
        .read(0..lengths.count())?
        .into_iter()
        .enumerate()
        .map(|(row, length)| {
            u32::try_from(length)
                .ok()
                .filter(|length| *length <= DecodeBatch::MAX_TOKENS)
                .ok_or_else(|| invalid(format!("lengths[{row}]"), length, format!("0 to {}", DecodeBatch::MAX_TOKENS)))
        })
        .collect()
}

/// A list or tuple of integers, or a 1-D int32 tensor, counted but not yet read.
pub(crate) struct Integers<'py> {
    name: &'static str,
    values: Bound<'py, PyAny>,
    count: usize,
    is_list: bool,
}

impl<'py> Integers<'py> {
    pub(crate) fn of(name: &'static str, values: &Bound<'py, PyAny>, expected: &str) -> Result<Self> {
        let is_list = values.is_instance_of::<PyList>() || values.is_instance_of::<PyTuple>();
        if !is_list && !is_array(values)? {
            return Err(wrong_type(name, type_name(values), expected));
        }
        let count = if is_list { values.len()? } else { Self::array(name, values)?.sizes[0] as usize };
        Ok(Self { name, values: values.clone(), count, is_list })
    }

    fn array(name: &'static str, values: &Bound<'py, PyAny>) -> Result<Tensor<'py>> {
        let tensor = Tensor::read(name, values, None)?;
        if tensor.rank != 1 {
            return Err(invalid(name, format!("shape {}", tensor.shape()), "one dimension"));
        }
        Ok(tensor)
    }

    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// Those of a range below the count.
    pub(crate) fn read(&self, range: Range<usize>) -> Result<Vec<i64>> {
        let Self { name, values, .. } = self;
        if self.is_list {
            return range
                .map(|position| {
                    let name = || format!("{name}[{position}]");
                    integer(&entry(values, position, name)?, "an integer", name)
                })
                .collect();
        }
        // Anew: other arguments' code may have run since it was counted.
        let tensor = Self::array(name, values)?;
        if range.end > tensor.sizes[0] as usize {
            return Err(invalid(*name, format!("shape {}", tensor.shape()), format!("[{}], as before", self.count)));
        }
        let elements = foreign::elements::<i32>(&tensor, &Element::I32)?;
        let stride = tensor.strides[0] as usize;
        Ok(range.map(|index| i64::from(elements[index * stride])).collect())
    }
}

/// An entry of a list or tuple, which may have lost some while another entry's own code ran.
fn entry<'py>(list: &Bound<'py, PyAny>, position: usize, name: impl Fn() -> String) -> Result<Bound<'py, PyAny>> {
    list.get_item(position).or_else(|error| {
        let error = own_error(list.py(), error)?;
        Err(invalid(name(), "nothing", "the entry that was there before").caused_by(list.py(), error))
    })
}

/// An element of a list.
fn integer(value: &Bound<'_, PyAny>, expected: &str, name: impl Fn() -> String) -> Result<i64> {
    match index_of(value)? {
        Index::Is(number) => {
            number.extract().map_err(|_| invalid(name(), &number, format!("{expected} of at most 64 bits")))
        }
        Index::IsNot(what, cause) => Err(no_integer(&name(), what, cause, expected)),
    }
}
