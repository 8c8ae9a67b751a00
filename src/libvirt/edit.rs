//! Changing an XML document by replacing ranges of its text: what is not changed stays byte for byte as libvirt wrote it.

use std::ops::Range;

use roxmltree::{Attribute, Document, Node};

use crate::qmp::{Error, Result};

/// A document's text and what is to be changed in it.
pub(super) struct Edits<'a> {
    text: &'a str,
    edits: Vec<(Range<usize>, String)>,
}

impl<'a> Edits<'a> {
    pub(super) fn of(text: &'a str) -> Self {
        Self {
            text,
            edits: Vec::new(),
        }
    }

    /// Removes an element and the white space before it.
    pub(super) fn remove(&mut self, node: Node<'_, '_>) {
        let range = node.range();
        let before = self.text.get(..range.start).unwrap_or_default();
        let start = before.trim_end().len();
        self.edits.push((start..range.end, String::new()));
    }

    /// Puts an element in the place of another.
    pub(super) fn replace(&mut self, node: Node<'_, '_>, element: &str) {
        self.edits.push((node.range(), element.to_owned()));
    }

    /// Puts an element before another one.
    pub(super) fn insert_before(&mut self, node: Node<'_, '_>, element: &str) {
        let at = node.range().start;
        self.edits.push((at..at, element.to_owned()));
    }

    /// Makes this text all that an element contains.
    pub(super) fn set_text(&mut self, node: Node<'_, '_>, text: &str) {
        let (open, empty) = self.open_end(node);
        let text = escape(text);
        let end = node.range().end;
        if empty {
            let name = self.name(node);
            self.edits
                .push((open - 1..end, format!(">{text}</{name}>")));
        } else {
            let close = self
                .slice(open..end)
                .rfind("</")
                .map_or(end, |at| open + at);
            self.edits.push((open + 1..close, text));
        }
    }

    /// Takes all that an element contains out of it.
    pub(super) fn clear(&mut self, node: Node<'_, '_>) {
        let (open, empty) = self.open_end(node);
        if !empty {
            self.edits.push((open..node.range().end, "/>".to_owned()));
        }
    }

    pub(super) fn set_attribute(&mut self, node: Node<'_, '_>, name: &str, value: &str) {
        let value = escape(value);
        if let Some(found) = attribute(node, name) {
            self.edits.push((found.range_value(), value));
        } else {
            let at = node.range().start + 1 + self.name(node).len();
            self.edits.push((at..at, format!(" {name}='{value}'")));
        }
    }

    pub(super) fn remove_attribute(&mut self, node: Node<'_, '_>, name: &str) {
        if let Some(found) = attribute(node, name) {
            let range = found.range();
            let before = self.text.get(..range.start).unwrap_or_default();
            self.edits
                .push((before.trim_end().len()..range.end, String::new()));
        }
    }

    /// The text with all changes, which is a document again. What lies in something that was replaced goes with it.
    pub(super) fn apply(mut self) -> Result<String> {
        // What is put before an element comes before what takes its place; the outer of two changes before the inner.
        self.edits.sort_by_key(|(range, _)| {
            (range.start, !range.is_empty(), std::cmp::Reverse(range.end))
        });
        let mut made = String::with_capacity(self.text.len());
        let mut at = 0;
        for (range, new) in &self.edits {
            if range.start < at {
                if range.end > at {
                    return Err(broken("two changes of one place"));
                }
                continue;
            }
            made.push_str(self.slice(at..range.start));
            made.push_str(new);
            at = range.end;
        }
        made.push_str(self.slice(at..self.text.len()));
        Document::parse(&made).map_err(|error| broken(&error.to_string()))?;
        Ok(made)
    }

    fn slice(&self, range: Range<usize>) -> &'a str {
        self.text.get(range).unwrap_or_default()
    }

    /// The element's name as it is written, with a prefix.
    fn name(&self, node: Node<'_, '_>) -> &'a str {
        let text = self.slice(node.range());
        let name = text.get(1..).unwrap_or_default();
        let end = name.find(|c: char| c.is_whitespace() || c == '/' || c == '>');
        name.get(..end.unwrap_or(name.len())).unwrap_or_default()
    }

    /// Where the start tag's `>` is, and whether it is the whole element.
    fn open_end(&self, node: Node<'_, '_>) -> (usize, bool) {
        let range = node.range();
        // A value may have a `>`: what comes after the last attribute may not.
        let last = node.attributes().map(|found| found.range().end).max();
        let from = last.unwrap_or(range.start);
        let open = self.slice(from..range.end).find('>');
        let open = open.map_or(range.end, |at| from + at);
        (open, self.slice(range.start..open).ends_with('/'))
    }
}

fn attribute<'a, 'i>(node: Node<'a, 'i>, name: &str) -> Option<Attribute<'a, 'i>> {
    node.attributes().find(|found| found.name() == name)
}

fn broken(why: &str) -> Error {
    Error::Libvirt(format!("the domain's XML cannot be changed: {why}"))
}

/// A text as it may stand in an element or a value.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '\'' => escaped.push_str("&apos;"),
            '"' => escaped.push_str("&quot;"),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    fn edited(text: &str, edit: impl FnOnce(&mut Edits<'_>, &Document<'_>)) -> String {
        let document = Document::parse(text).unwrap();
        let mut edits = Edits::of(text);
        edit(&mut edits, &document);
        edits.apply().unwrap()
    }

    fn find<'a, 'i>(document: &'a Document<'i>, name: &str) -> Node<'a, 'i> {
        let mut all = document.descendants();
        all.find(|node| node.has_tag_name(name)).unwrap()
    }

    #[test]
    fn texts_are_set_in_all_spellings_of_an_element() {
        for (before, after) in [
            ("<a><b/></a>", "<a><b>x&amp;&lt;y</b></a>"),
            ("<a><b k='1>2' /></a>", "<a><b k='1>2' >x&amp;&lt;y</b></a>"),
            ("<a><b></b></a>", "<a><b>x&amp;&lt;y</b></a>"),
            (
                "<a><b\n k=\"v\"> o &amp; <c/> </b ></a>",
                "<a><b\n k=\"v\">x&amp;&lt;y</b ></a>",
            ),
        ] {
            let made = edited(before, |edits, document| {
                edits.set_text(find(document, "b"), "x&<y");
            });
            assert_eq!(made, after);
            let made = Document::parse(&made).unwrap();
            assert_eq!(find(&made, "b").text(), Some("x&<y"));
        }
    }

    #[test]
    fn attributes_come_change_and_go() {
        let made = edited("<a k='1' l=\"2\"><b/></a>", |edits, document| {
            let root = document.root_element();
            edits.set_attribute(root, "k", "it's");
            edits.remove_attribute(root, "l");
            edits.set_attribute(find(document, "b"), "new", "<");
        });
        assert_eq!(made, "<a k='it&apos;s'><b new='&lt;'/></a>");
    }

    #[test]
    fn what_is_in_something_that_goes_goes_with_it() {
        let made = edited(
            "<a>\n  <b><c k='1'/></b>\n  <d/>\n</a>",
            |edits, document| {
                edits.set_attribute(find(document, "c"), "k", "2");
                edits.remove(find(document, "b"));
                edits.insert_before(find(document, "d"), "<e/>");
                edits.replace(find(document, "d"), "<f/>");
            },
        );
        assert_eq!(made, "<a>\n  <e/><f/>\n</a>");
        let made = edited("<a><b k='1'>x<c/></b></a>", |edits, document| {
            edits.clear(find(document, "b"));
        });
        assert_eq!(made, "<a><b k='1'/></a>");
    }
}
