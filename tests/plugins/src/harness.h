/** Named tests without a framework, and doubles of the TensorRT objects that a plugin is handed. */
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <cstdio>
#include <deque>
#include <functional>
#include <string>
#include <vector>

// ---- Tests: TEST(name) { CHECK(…); }, run by name ----

struct Test
{
    char const* name;
    void (*body)();
};

inline std::vector<Test>& tests()
{
    static std::vector<Test> all;
    return all;
}

inline int& failures()
{
    static int count = 0;
    return count;
}

struct Register
{
    Register(char const* name, void (*body)()) { tests().push_back({name, body}); }
};

#define TEST(name)                                                                                                     \
    static void name();                                                                                                \
    static Register const register_##name(#name, name);                                                                \
    static void name()

#define CHECK(claim)                                                                                                   \
    do                                                                                                                 \
    {                                                                                                                  \
        if (!(claim))                                                                                                  \
        {                                                                                                              \
            std::printf("%s:%d: not true: %s\n", __FILE__, __LINE__, #claim);                                          \
            ++failures();                                                                                              \
        }                                                                                                              \
    } while (false)

/** Runs one test. 0: it holds; 1: it doesn't; 2: there is none of that name. */
inline int run_test(std::string const& name)
{
    for (Test const& test : tests())
    {
        if (name == test.name)
        {
            test.body();
            return failures() == 0 ? 0 : 1;
        }
    }
    std::printf("there is no test %s\n", name.c_str());
    return 2;
}

// ---- Doubles ----

/** Keeps what is logged. */
class Logger : public nvinfer1::ILogger
{
public:
    void log(Severity severity, char const* message) noexcept override
    {
        if (severity == Severity::kERROR)
        {
            errors.emplace_back(message);
        }
        else
        {
            others.emplace_back(message);
        }
    }

    std::vector<std::string> errors;
    std::vector<std::string> others;
};

class Finder : public nvinfer1::ILoggerFinder
{
public:
    nvinfer1::ILogger* findLogger() override { return &logger; }
    Logger logger;
};

/** A dimension: a constant, or one known by its name only. */
class Dimension : public nvinfer1::IDimensionExpr
{
public:
    Dimension(std::string of_name, int64_t of_value)
        : name(std::move(of_name))
        , value(of_value)
        , implementation_(*this)
    {
        mImpl = &implementation_;
    }
    ~Dimension() noexcept override = default;

    std::string const name;
    int64_t const value; // -1: not a constant

private:
    class Implementation : public nvinfer1::apiv::VDimensionExpr
    {
    public:
        explicit Implementation(Dimension const& of)
            : of_(of)
        {
        }
        bool isConstant() const override { return of_.value != -1; }
        int64_t getConstantValue() const override { return of_.value; }
        bool isSizeTensor() const override { return false; }

    private:
        Dimension const& of_;
    };
    Implementation implementation_;
};

/** Makes constants, and refuses arithmetic: no output of these plugins needs any. */
class Builder : public nvinfer1::IExprBuilder
{
public:
    Builder()
        : implementation_(*this)
    {
        mImpl = &implementation_;
    }
    ~Builder() noexcept override = default;

    Dimension const* make(std::string const& name, int64_t value = -1)
    {
        return &dimensions_.emplace_back(name, value);
    }

    nvinfer1::DimsExprs shape(std::vector<Dimension const*> const& dimensions) const
    {
        nvinfer1::DimsExprs result{};
        result.nbDims = static_cast<int32_t>(dimensions.size());
        for (size_t i = 0; i < dimensions.size(); ++i)
        {
            result.d[i] = dimensions[i];
        }
        return result;
    }

private:
    class Implementation : public nvinfer1::apiv::VExprBuilder
    {
    public:
        explicit Implementation(Builder& of)
            : of_(of)
        {
        }
        nvinfer1::IDimensionExpr const* constant(int64_t value) override { return of_.make("constant", value); }
        nvinfer1::IDimensionExpr const* operation(
            nvinfer1::DimensionOperation, nvinfer1::IDimensionExpr const&, nvinfer1::IDimensionExpr const&) override
        {
            return nullptr;
        }
        nvinfer1::IDimensionExpr const* declareSizeTensor(
            int32_t, nvinfer1::IDimensionExpr const&, nvinfer1::IDimensionExpr const&) override
        {
            return nullptr;
        }

    private:
        Builder& of_;
    };
    std::deque<Dimension> dimensions_; // never moved: expressions are pointers
    Implementation implementation_;
};
