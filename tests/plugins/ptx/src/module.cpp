#include "module.h"

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cstdlib>
#include <map>
#include <optional>

namespace ptx
{
namespace
{

bool is_word(char c)
{
    return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_' || c == '$' || c == '%' || c == '.';
}

std::string_view trimmed(std::string_view text)
{
    while (!text.empty() && std::isspace(static_cast<unsigned char>(text.front())) != 0)
        text.remove_prefix(1);
    while (!text.empty() && std::isspace(static_cast<unsigned char>(text.back())) != 0)
        text.remove_suffix(1);
    return text;
}

// A type's size: ".b32" is 32, ".pred" 1; 0 of another word.
uint32_t bits_of(std::string_view type)
{
    if (type == ".pred")
        return 1;
    size_t const digits = type.find_first_of("0123456789");
    if (digits != 2 || type[0] != '.' || std::string_view("bsuf").find(type[1]) == std::string::npos)
        return 0;
    return static_cast<uint32_t>(std::strtoul(std::string(type.substr(digits)).c_str(), nullptr, 10));
}

// The value of 12, -1, 0x7773U or 0f3F800000; nothing where it is another word.
std::optional<uint64_t> number_of(std::string text)
{
    bool const is_negative = !text.empty() && text[0] == '-';
    text.erase(0, is_negative ? 1 : 0);
    if (text.empty() || std::isdigit(static_cast<unsigned char>(text[0])) == 0)
        return std::nullopt;
    bool const is_float = text.size() == 10 && (text[1] == 'f' || text[1] == 'F');
    if (is_float)
        text.erase(0, 2);
    else if (text.back() == 'U')
        text.pop_back();
    char* end = nullptr;
    errno = 0;
    uint64_t const value = std::strtoull(text.c_str(), &end, is_float ? 16 : 0);
    if (*end != '\0' || errno != 0 || (is_float && is_negative))
        return std::nullopt;
    return is_negative ? -value : value;
}

// Walks over text, and counts lines. Comments are gone before.
class Reader
{
public:
    explicit Reader(std::string text, uint32_t first_line = 1)
        : text_(std::move(text))
        , line_(first_line)
    {
    }

    bool at_end()
    {
        skip_space();
        return at_ == text_.size();
    }

    char peek() { return at_end() ? '\0' : text_[at_]; }

    bool take(char wanted)
    {
        if (peek() != wanted)
            return false;
        ++at_;
        return true;
    }

    void expect(char wanted)
    {
        if (!take(wanted))
            fail(std::string("'") + wanted + "' was expected");
    }

    // A name, number or directive; empty where there is none.
    std::string word()
    {
        skip_space();
        size_t const begin = at_;
        while (at_ < text_.size() && (is_word(text_[at_]) || text_.compare(at_, 2, "::") == 0))
            at_ += text_[at_] == ':' ? 2 : 1;
        return text_.substr(begin, at_ - begin);
    }

    // Everything up to a character, which is taken too.
    std::string_view until(char wanted)
    {
        skip_space();
        size_t const end = text_.find(wanted, at_);
        if (end == std::string::npos)
            fail(std::string("'") + wanted + "' is missing");
        std::string_view const found = std::string_view(text_).substr(at_, end - at_);
        line_ += static_cast<uint32_t>(std::count(found.begin(), found.end(), '\n'));
        at_ = end + 1;
        return trimmed(found);
    }

    uint64_t number()
    {
        std::string const text = word();
        std::optional<uint64_t> const value = number_of(text);
        if (!value)
            fail("'" + text + "' is no number");
        return *value;
    }

    // Bits of a type.
    uint32_t type()
    {
        std::string const text = word();
        uint32_t const bits = bits_of(text);
        if (bits != 1 && bits != 8 && bits != 16 && bits != 32 && bits != 64)
            fail("'" + text + "' is no type");
        return bits;
    }

    uint32_t line()
    {
        skip_space();
        return line_;
    }

    [[noreturn]] void fail(std::string const& what) { throw Error("PTX line " + std::to_string(line()) + ": " + what); }

private:
    void skip_space()
    {
        for (; at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_])) != 0; ++at_)
            line_ += text_[at_] == '\n' ? 1 : 0;
    }

    std::string text_;
    size_t at_ = 0;
    uint32_t line_;
};

// Spaces where comments were; lines stay.
std::string without_comments(std::string_view text)
{
    std::string result(text);
    for (size_t at = 0; at + 1 < result.size(); ++at)
    {
        if (result[at] != '/' || (result[at + 1] != '/' && result[at + 1] != '*'))
            continue;
        bool const is_line = result[at + 1] == '/';
        size_t end = result.find(is_line ? "\n" : "*/", at + 2);
        end = end == std::string::npos ? result.size() : end + (is_line ? 0 : 2);
        for (; at < end; ++at)
            result[at] = result[at] == '\n' ? '\n' : ' ';
        --at;
    }
    return result;
}

// `mov` has one name for copying a register, and for taking one apart or putting one together of a vector.
std::string form_name(std::string const& name, std::string_view operands)
{
    if (name.compare(0, 4, "mov.") != 0 || operands.find('{') == std::string_view::npos)
        return name;
    return name + (operands.front() == '{' ? " {}, d" : " d, {}");
}

// What the operands of one instruction come to, in the order in which they stand.
struct Operands
{
    std::vector<uint32_t> registers;
    std::array<int64_t, 2> offsets{};
    size_t num_addresses = 0;
    std::string label;
};

class KernelParser
{
public:
    KernelParser(Reader& reader, std::map<std::string, uint32_t> const& shared, Kernel& kernel)
        : reader_(reader)
        , shared_(shared)
        , kernel_(kernel)
    {
    }

    void parse()
    {
        for (Parameter const& parameter : kernel_.parameters)
            parameters_[parameter.name] = parameter.offset;
        scopes_.emplace_back();
        while (!scopes_.empty())
            statement();
        for (auto const& [at, label] : branches_)
        {
            auto const found = labels_.find(label);
            if (found == labels_.end())
                throw Error("PTX line " + std::to_string(kernel_.code[at].line) + ": there is no label " + label);
            kernel_.code[at].target = found->second;
        }
    }

private:
    void statement()
    {
        if (reader_.take('{'))
        {
            scopes_.emplace_back();
            return;
        }
        if (reader_.take('}'))
        {
            scopes_.pop_back();
            return;
        }
        Instruction instruction;
        instruction.line = reader_.line();
        if (reader_.take('@'))
        {
            instruction.is_guard_negated = reader_.take('!');
            instruction.guard = find(reader_.word(), reader_);
        }
        std::string const name = reader_.word();
        if (name == ".reg")
            return declare();
        if (name == ".pragma")
        {
            reader_.until(';'); // advice
            return;
        }
        if (name.empty() || name[0] == '.')
            reader_.fail("'" + name + std::string(1, reader_.peek()) + "' isn't understood");
        if (reader_.take(':'))
        {
            labels_[name] = static_cast<uint32_t>(kernel_.code.size());
            return;
        }
        std::string_view const operands = reader_.until(';');
        instruction.name = name;
        instruction.text = name + (operands.empty() ? "" : " ") + std::string(operands);
        std::vector<Form const*> const forms = find_forms(form_name(name, operands));
        if (!forms.empty())
            resolve(instruction, operands, forms);
        kernel_.code.push_back(std::move(instruction));
    }

    // .reg .b32 %r<12>; or .reg .pred p, q;
    void declare()
    {
        uint32_t const bits = reader_.type();
        do
        {
            std::string const name = reader_.word();
            if (!reader_.take('<'))
            {
                add(name, bits);
                continue;
            }
            uint64_t const count = reader_.number();
            reader_.expect('>');
            for (uint64_t index = 0; index < count; ++index)
                add(name + std::to_string(index), bits);
        } while (reader_.take(','));
        reader_.expect(';');
    }

    uint32_t add(std::string const& name, uint32_t bits, Preset preset = Preset::nothing, uint64_t value = 0)
    {
        auto const number = static_cast<uint32_t>(kernel_.registers.size());
        kernel_.registers.push_back({name, bits, preset, value});
        scopes_.back()[name] = number;
        return number;
    }

    // A register's number; those that a block gives its threads, and constants, get one here.
    uint32_t find(std::string const& name, Reader& of)
    {
        for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope)
        {
            if (auto const found = scope->find(name); found != scope->end())
                return found->second;
        }
        static std::map<std::string, Preset> const kSpecial = {{"%tid.x", Preset::thread},
            {"%ctaid.x", Preset::block_x}, {"%ctaid.y", Preset::block_y}, {"%ctaid.z", Preset::block_z}};
        if (auto const special = kSpecial.find(name); special != kSpecial.end())
            return add(name, 32, special->second);
        if (name == "_")
            return add(name, 64); // a result that nobody wants
        if (auto const value = number_of(name))
            return add(name, 64, Preset::value, *value);
        if (auto const symbol = shared_.find(name); symbol != shared_.end())
            return add(name, 64, Preset::value, symbol->second);
        if (auto const parameter = parameters_.find(name); parameter != parameters_.end())
            return add(name, 64, Preset::value, parameter->second);
        of.fail("there is no '" + name + "'");
    }

    void read_operand(Reader& of, Operands& into, bool is_branch)
    {
        if (of.take('{'))
        {
            do
                read_operand(of, into, false);
            while (of.take(','));
            of.expect('}');
            return;
        }
        if (of.take('['))
        {
            into.registers.push_back(find(of.word(), of));
            if (of.take('+') || of.peek() == '-')
            {
                bool const is_negative = of.take('-');
                auto const offset = number_of(of.word());
                if (!offset)
                    of.fail("an address without its offset");
                if (into.num_addresses == into.offsets.size())
                    of.fail("more than two addresses");
                into.offsets[into.num_addresses] = static_cast<int64_t>(is_negative ? -*offset : *offset);
            }
            ++into.num_addresses;
            of.expect(']');
            return;
        }
        bool const is_negative = of.take('-');
        std::string const word = (is_negative ? "-" : "") + of.word();
        if (is_branch)
            into.label = word;
        else
            into.registers.push_back(find(word, of));
    }

    void resolve(Instruction& instruction, std::string_view text, std::vector<Form const*> const& forms)
    {
        bool const is_branch = forms[0]->effect == Effect::branch || forms[0]->effect == Effect::uniform_branch;
        Operands operands;
        Reader reader(std::string(text), instruction.line);
        while (!reader.at_end())
        {
            read_operand(reader, operands, is_branch);
            if (!reader.at_end())
                reader.expect(',');
        }
        for (Form const* form : forms)
        {
            if (form->destinations + form->sources == operands.registers.size())
                instruction.form = form;
        }
        if (instruction.form == nullptr)
        {
            throw Error("PTX line " + std::to_string(instruction.line) + ": " + instruction.text + " has "
                + std::to_string(operands.registers.size()) + " operands, not "
                + std::to_string(forms[0]->destinations + forms[0]->sources));
        }
        Form const& form = *instruction.form;
        for (size_t at = 0; at < operands.registers.size(); ++at)
        {
            bool const is_destination = at < form.destinations;
            if (is_destination && kernel_.registers[operands.registers[at]].preset != Preset::nothing)
                throw Error("PTX line " + std::to_string(instruction.line) + ": " + instruction.text
                    + ": its result isn't a register");
            (is_destination ? instruction.destinations[at] : instruction.sources[at - form.destinations]) =
                operands.registers[at];
        }
        if (form.destinations != 0)
        {
            uint32_t const bits = kernel_.registers[instruction.destinations[0]].bits;
            instruction.destination_mask = bits == 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1;
        }
        instruction.offsets = operands.offsets;
        if (is_branch)
            branches_.emplace_back(kernel_.code.size(), operands.label);
    }

    Reader& reader_;
    std::map<std::string, uint32_t> const& shared_;
    Kernel& kernel_;
    std::map<std::string, uint32_t> parameters_, labels_;
    std::vector<std::map<std::string, uint32_t>> scopes_;
    std::vector<std::pair<size_t, std::string>> branches_; // instruction and label
};

class ModuleParser
{
public:
    explicit ModuleParser(std::string_view text)
        : reader_(without_comments(text))
    {
    }

    Module parse()
    {
        while (!reader_.at_end())
            directive();
        return std::move(module_);
    }

private:
    void directive()
    {
        std::string const name = reader_.word();
        if (name == ".version" || name == ".address_size")
            reader_.word();
        else if (name == ".target")
            target();
        else if (name == ".visible" || name == ".weak")
            return;
        else if (name == ".extern" || name == ".shared")
            shared(name == ".extern");
        else if (name == ".global")
            reader_.until(';'); // data that no instruction may name
        else if (name == ".entry")
            entry();
        else
            reader_.fail("'" + name + std::string(1, reader_.peek()) + "' isn't understood");
    }

    void target()
    {
        module_.target = reader_.word();
        while (reader_.take(','))
            reader_.word(); // "debug" and the like
    }

    // .extern .shared .align 16 .b8 name[]; the size of what is declared without .extern is fixed.
    void shared(bool is_extern)
    {
        if (is_extern && reader_.word() != ".shared")
            reader_.fail("only shared memory may be extern");
        if (reader_.word() != ".align")
            reader_.fail("an alignment was expected");
        uint64_t const alignment = reader_.number();
        uint64_t const element = reader_.type() / 8;
        std::string const name = reader_.word();
        reader_.expect('[');
        uint64_t const count = reader_.peek() == ']' ? 0 : reader_.number();
        reader_.expect(']');
        reader_.expect(';');
        uint64_t const offset = (module_.static_shared_bytes + alignment - 1) / alignment * alignment;
        shared_[name] = static_cast<uint32_t>(kSharedBase + offset);
        module_.static_shared_bytes = static_cast<uint32_t>(offset + element * count);
    }

    void entry()
    {
        Kernel kernel;
        kernel.name = reader_.word();
        reader_.expect('(');
        uint32_t end = 0;
        while (!reader_.take(')'))
        {
            parameter(kernel, end);
            reader_.take(',');
        }
        while (reader_.peek() == '.')
        {
            std::string const name = reader_.word();
            if (name != ".reqntid" && name != ".maxntid" && name != ".minnctapersm")
                reader_.fail("'" + name + "' isn't understood");
            uint64_t threads = reader_.number();
            while (reader_.take(','))
                threads *= reader_.number();
            if (name == ".reqntid")
                kernel.threads = static_cast<uint32_t>(threads);
        }
        reader_.expect('{');
        KernelParser(reader_, shared_, kernel).parse();
        module_.kernels.push_back(std::move(kernel));
    }

    // .param .u64 .ptr .global .align 1 name
    void parameter(Kernel& kernel, uint32_t& end)
    {
        if (reader_.word() != ".param")
            reader_.fail("a parameter was expected");
        Parameter parameter;
        parameter.bytes = reader_.type() / 8;
        std::string word = reader_.word();
        for (; !word.empty() && word[0] == '.'; word = reader_.word())
        {
            if (word == ".align")
                reader_.number();
        }
        parameter.name = word;
        parameter.offset = (end + parameter.bytes - 1) / parameter.bytes * parameter.bytes;
        end = parameter.offset + parameter.bytes;
        kernel.parameters.push_back(std::move(parameter));
    }

    Reader reader_;
    Module module_;
    std::map<std::string, uint32_t> shared_;
};

} // namespace

Module parse(std::string_view text)
{
    return ModuleParser(text).parse();
}

} // namespace ptx
