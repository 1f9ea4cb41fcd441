//! The tables that jobs end with.

use comfy_table::{CellAlignment, Table, presets};

/// A table with this header; the columns from `numbers_from` on are aligned to the right.
pub(crate) fn table<const N: usize>(header: [&str; N], numbers_from: usize) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_header(header);
    for column in numbers_from..N {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}
